"""A seeded catalogue of broken configurations, data sets and runs, and of sound ones (SPEC H1, H4).

Every broken case says what somebody did wrong, makes it from a seed, and names the finding that tells the true cause.
`test_catalogue.py` runs `vlmtune check` or `vlmtune doctor` on each; `python -m tests.catalogue --record` writes what
they said to docs/guide/catalogue.md.
"""
