"""What learns, and how. peft imports bitsandbytes where it is installed, which then warns on every start that a
kernel for CPUs is missing; the kernel is optional and changes no result, so the line is kept away from users."""

import logging

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
