"""The same stop-watch in every arm, put on PYTHONPATH by run.py; an arm's own code is not touched.

An optimizer step is what lies between two ends of `torch.optim.Optimizer.step`, loading of data included. After
SPEED_WARMUP steps, and from then on after every SPEED_BLOCK, the arm reports and waits until it is its turn again, so
that one arm at a time computes.

So that losses can be compared, adapters start from the same numbers in all arms, and the line break behind the end of a
reply (SPEED_TAIL: ids of the end and of the break), which the peers' templates also supervise, is no target.
"""

import os
import sys

if os.environ.get("SPEED_ARM"):
    import importlib.abc
    import importlib.machinery
    import json
    import time

    FOLDER, ARM = os.environ["SPEED_TURNS"], os.environ["SPEED_ARM"]
    WARMUP, BLOCK = int(os.environ["SPEED_WARMUP"]), int(os.environ["SPEED_BLOCK"])
    STARTED = time.time()
    state = {"steps": [], "losses": [], "supervised": [], "begun": None, "own": 0.0, "busy": 0.0, "micro": 0}

    def busy() -> float:
        """CPU seconds of the whole machine."""
        with open("/proc/stat") as file:
            fields = [int(field) for field in file.readline().split()[1:9]]
        return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")

    def status(key: str) -> int:
        with open("/proc/self/status") as file:
            return int(next(line for line in file if line.startswith(key + ":")).split()[1]) * 1024

    def begin() -> None:
        state["begun"], state["own"], state["busy"] = time.perf_counter(), time.process_time(), busy()

    def after_step(optimizer, *_) -> None:
        if type(optimizer.param_groups[0]["params"][0].data).__name__ == "FakeTensor":
            return  # vlmtune counts the memory of a step on tensors without data
        now, own, all_of_it = time.perf_counter(), time.process_time(), busy()
        if state["begun"] is not None:
            foreign = (all_of_it - state["busy"]) - (own - state["own"])
            state["steps"].append([now - state["begun"], own - state["own"], foreign])
        else:
            state["steps"].append(None)
        done = len(state["steps"])
        if done >= WARMUP and (done - WARMUP) % BLOCK == 0:
            report = {"arm": ARM, "steps": state["steps"], "losses": state["losses"], "supervised": state["supervised"],
                      "started": STARTED, "peak": status("VmHWM"), "trained": trained()}  # fmt: skip
            with open(f"{FOLDER}/{ARM}.done", "w") as pipe:
                pipe.write(json.dumps(report) + "\n")
            with open(f"{FOLDER}/{ARM}.go") as pipe:
                if pipe.readline().strip() == "stop":
                    os._exit(0)
            if done == WARMUP:
                with open("/proc/self/clear_refs", "w") as account:
                    account.write("5")  # the peak of training, not of loading
        begin()

    def trained() -> int:
        import gc

        import torch

        optimizers = [thing for thing in gc.get_objects() if isinstance(thing, torch.optim.Optimizer)]
        return max(sum(p.numel() for group in o.param_groups for p in group["params"]) for o in optimizers)

    def patch_optimizer(module) -> None:
        module.register_optimizer_step_post_hook(after_step)

    def patch_trainer(module) -> None:
        """Losses of the arms that use transformers' Trainer, and how many tokens they are means over."""
        original, count = module.Trainer.training_step, module.Trainer._get_num_items_in_batch
        end, line_break = map(int, os.environ["SPEED_TAIL"].split(","))

        def count_items(self, batch_samples, *args, **kwargs):
            for batch in batch_samples:
                labels = batch["labels"]
                labels[:, 1:].masked_fill_((labels[:, :-1] == end) & (labels[:, 1:] == line_break), -100)
            return count(self, batch_samples, *args, **kwargs)

        def training_step(self, model, inputs, *args, **kwargs):
            supervised = int((inputs["labels"][:, 1:] != -100).sum())
            loss = original(self, model, inputs, *args, **kwargs)
            accumulation = self.args.gradient_accumulation_steps
            if state["micro"] % accumulation == 0:
                state["losses"].append(0.0)
                state["supervised"].append(0)
            state["micro"] += 1
            state["losses"][-1] += float(loss)
            state["supervised"][-1] += supervised
            return loss

        module.Trainer.training_step = training_step
        module.Trainer._get_num_items_in_batch = count_items

    def patch_lora(module) -> None:
        """The first factor of every adapter is drawn from a seed made of the layer it adapts."""
        import torch

        original = module.LoraLayer.reset_lora_parameters

        def reset(self, adapter_name, *args, **kwargs):
            before = torch.get_rng_state()
            weight = self.get_base_layer().weight
            if weight.dtype.is_floating_point:
                first = weight.detach().flatten()[:64].to(torch.bfloat16).float().abs().sum()
                torch.manual_seed(int(first * 1e6) % 2**31)
            result = original(self, adapter_name, *args, **kwargs)
            torch.set_rng_state(before)
            return result

        module.LoraLayer.reset_lora_parameters = reset

    PATCHES = {
        "torch.optim.optimizer": patch_optimizer,
        "transformers.trainer": patch_trainer,
        "peft.tuners.lora.layer": patch_lora,
    }

    class Loader(importlib.abc.Loader):
        def __init__(self, loader, name):
            self.loader, self.name = loader, name

        def create_module(self, spec):
            return self.loader.create_module(spec)

        def exec_module(self, module):
            self.loader.exec_module(module)
            PATCHES[self.name](module)

        def __getattr__(self, name):
            return getattr(self.loader, name)

    class Finder(importlib.abc.MetaPathFinder):
        looking = False

        def find_spec(self, name, path, target=None):
            if name not in PATCHES or Finder.looking:
                return None
            Finder.looking = True
            try:
                spec = importlib.machinery.PathFinder.find_spec(name, path)
            finally:
                Finder.looking = False
            if spec:
                spec.loader = Loader(spec.loader, name)
            return spec

    sys.meta_path.insert(0, Finder())
