"""`train`: one run, from its settings to its last checkpoint, and on from wherever it was killed.

Nothing random is carried from step to step: batches are a function of the seed and the step (see `order`), and every
step seeds torch anew for what the model draws itself (dropout). So weights and AdamW's state are all that a run needs
to go on, and an interrupted run gives the same bits.
"""

import contextlib
import os
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headwater.core.errors import ModelError, StoreError
from headwater.core.files import clean_leftovers
from headwater.core.progress import note, track
from headwater.core.results import Provenance
from headwater.core.store import take_lock
from headwater.dynamics.lab.config import TrainConfig
from headwater.dynamics.lab.corpus import assemble
from headwater.dynamics.lab.interventions import Interventions, parse, penalty
from headwater.dynamics.lab.models import make_model
from headwater.dynamics.lab.optimizing import make_optimizer, rate
from headwater.dynamics.lab.order import key
from headwater.dynamics.lab.processes import Processes, device_of, processes
from headwater.dynamics.lab.run import (
    TrainingResult,
    TrainingRun,
    begin,
    curve_frame,
    has_state,
    prepare_folder,
    read_state,
    save_checkpoint,
    save_state,
    validation_frame,
)

_VALIDATED_AT_ONCE = 256


def train(config: TrainConfig, out: str | Path, *, stop_at: int | None = None) -> TrainingRun:
    """Train a model from scratch into the folder `out`; a run that is there goes on, a finished one is given back.

    stop_at: leave after that step, to go on later. Under `torchrun` every process takes its part of each batch, and the
    gradients are added up: the same order of data and, up to rounding, the same losses as with one process.

    Raises MethodError or ModelError for settings that do not fit, StoreError for a folder that holds something else.
    Known failure: bits are the same only on the same kind of machine with the same versions, `threads` and number of
    processes; elsewhere the order of sums differs, and chaotic stretches of training amplify that.

    >>> run = train(TrainConfig.from_yaml("induction.yaml"), "runs/induction")           # doctest: +SKIP
    """
    path = Path(out)
    planned = [parse(one.do, one.steps) for one in config.interventions]  # a mistyped line is refused before anything
    device = device_of(config.device)
    with contextlib.ExitStack() as stack:
        group = stack.enter_context(processes(device))
        group.mine(config.batch)
        if group.first:
            prepare_folder(path)
            stack.enter_context(take_lock(path))
            clean_leftovers(path)
        group.wait()
        stack.enter_context(_same_bits(config, device))
        if not group.first:
            group.wait()  # the first process tokenizes
        data = assemble(config, path / "data")
        if group.first:
            group.wait()
        training = Training(config, path, data, planned, group, device)
        training.run(stop_at)
        group.wait()
    return TrainingRun.open(path)


class Training:
    """A run in memory: the model as it is now, AdamW's state, and the curve so far."""

    def __init__(
        self, config: TrainConfig, path: Path, data: Any, planned: list[Any], group: Processes, device: torch.device
    ) -> None:
        self.config, self.path, self.data, self.group, self.device = config, path, data, group, device
        self.hf = make_model(config, data.vocabulary, data.sequence_length, data.tokenizer).to(device)
        self.parameters = [weight for weight in self.hf.parameters() if weight.requires_grad]
        if group.first:
            begin(path, config, data, sum(weight.numel() for weight in self.parameters))
        self.adam = make_optimizer(self.hf, config.optimizer, device)
        self.takes_cache = "use_cache" in _arguments(self.hf)
        self.interventions: Interventions | None = None
        if planned:
            from headwater.core.model import Model

            self.interventions = Interventions(planned, Model(self.hf, name=config.name))
        self.kept = set(config.checkpoints.steps(config.steps))
        self.kept |= set(self.interventions.frozen_at if self.interventions else ())
        self.step, self.seconds = 0, 0.0
        self.curve: list[list[float]] = []
        self.validation: list[list[Any]] = []
        self._pending: list[tuple[int, float, Tensor, Tensor]] = []
        if has_state(path):
            self._resume()

    def run(self, stop_at: int | None) -> None:
        """Train to the end, or to `stop_at`."""
        config, last = self.config, min(self.config.steps, self.config.steps if stop_at is None else stop_at)
        saved, started = time.monotonic(), time.monotonic()
        if self.step == 0:
            self._keep()
        for step in track(range(self.step, last), f"training {config.name}"):
            self._update(step)
            self.step = step + 1
            self._keep()
            if time.monotonic() - saved >= config.checkpoints.save_seconds:
                self.seconds += time.monotonic() - started
                self._save()
                saved = started = time.monotonic()
        self.seconds += time.monotonic() - started
        over = self.step == config.steps
        finished = (self.path / "result" / "result.json").exists()
        if not finished or not over:
            self._save()
        if over and not finished and self.group.first:
            self._finish()

    # --- a step

    def _update(self, step: int) -> None:
        config, group = self.config, self.group
        torch.manual_seed(key(config.seed, "step", step, group.rank))
        rows, at = self.data.rows(step * config.batch, (step + 1) * config.batch)
        predicted = int(at[:, 1:].sum())
        mine = group.mine(config.batch)
        ids, at = torch.from_numpy(rows[mine]).to(self.device), torch.from_numpy(at[mine]).to(self.device)
        weights = self.data.weights(step * config.batch, (step + 1) * config.batch)
        weight = None if weights is None else torch.from_numpy(weights[mine]).to(self.device)
        size = config.micro_batch or len(ids)
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        for start in range(0, len(ids), size):
            part = slice(start, start + size)
            loss += self._backward(step, ids[part], at[part], predicted, None if weight is None else weight[part])
        for weight in self.parameters:
            if weight.grad is None:
                # cut off by an intervention, wholly: a gradient of zero, as where a part of a weight is cut off
                weight.grad = torch.zeros_like(weight)
        group.add_up([loss])
        group.add_up(weight.grad for weight in self.parameters if weight.grad is not None)
        clip = config.optimizer.clip
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, float("inf") if clip is None else clip)
        lr = rate(step, config.steps, config.optimizer.lr, config.schedule)
        for one in self.adam.param_groups:
            one["lr"] = lr
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        self._pending.append((step + 1, lr, loss, norm))
        if len(self._pending) >= 100:
            self._settle()

    def _backward(self, step: int, ids: Tensor, at: Tensor, predicted: int, weight: Tensor | None) -> Tensor:
        """Add the gradients of one micro-batch; its part of the loss (penalties are no part of it)."""
        inputs, targets, mask = ids[:, :-1], ids[:, 1:], at[:, 1:]
        on, penalties = ([], []) if self.interventions is None else self._interventions(step, inputs)
        with contextlib.ExitStack() as stack:
            session = None
            if on or penalties:
                assert self.interventions is not None
                session = self.interventions.session(on, [site for _, site, _ in penalties])
                stack.enter_context(session.installed())
            loss = self._loss(inputs, targets, mask, weight) / predicted
            total = loss
            for one, site, places in penalties:
                assert session is not None
                seen = session.kept[str(site)].value
                total = total + penalty(one, seen, places).to(loss.dtype) * (len(ids) / self.config.batch)
            total.backward()
            if session is not None and (lost := [str(i) for i in on if id(i) not in session.fired]):
                raise ModelError("an intervention never fired", got="; ".join(lost), fix="Its site was not reached")
        return loss.detach().double()

    def _interventions(self, step: int, inputs: Tensor) -> Any:
        assert self.interventions is not None
        for wanted in self.interventions.needs(step):
            if not self.interventions.has_reference(wanted):
                self.group.wait()  # for the first process to have written it
                from headwater.core.loading import load

                folder = self.path / f"step-{wanted}"
                dtype = "float64" if self.config.dtype == "float64" else "float32"
                self.interventions.give_reference(wanted, load(str(folder), dtype=dtype, device=str(self.device)))
        return self.interventions.at(step, inputs)

    def _logits(self, inputs: Tensor) -> Tensor:
        arguments: dict[str, Any] = {"use_cache": False} if self.takes_cache else {}
        mixed = torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.dtype == "bfloat16")
        with mixed:
            return self.hf(input_ids=inputs, **arguments).logits

    def _loss(self, inputs: Tensor, targets: Tensor, mask: Tensor, weight: Tensor | None = None) -> Tensor:
        """The sum of the cross entropy over the predicted tokens, in nats; of each sequence times its weight."""
        chosen = self._logits(inputs)[mask].to(getattr(torch, self._loss_type))
        if weight is not None:
            each = torch.nn.functional.cross_entropy(chosen, targets[mask], reduction="none")
            return (each * weight[:, None].expand(mask.shape)[mask].to(each.dtype)).sum()
        return torch.nn.functional.cross_entropy(chosen, targets[mask], reduction="sum")

    @property
    def _loss_type(self) -> str:
        return "float64" if "float64" in (self.config.dtype, self.config.loss_dtype) else "float32"

    # --- what is written

    def _settle(self) -> None:
        """Read the losses of the last steps from the device."""
        per_step = self.config.batch * self.data.sequence_length
        for step, lr, loss, norm in self._pending:
            value = float(loss)
            if value != value or value in (float("inf"), float("-inf")):
                raise ModelError(
                    f"the loss of step {step} is not finite",
                    got=value,
                    fix="Lower the learning rate, clip, or use dtype float32; what was saved before is whole",
                )
            self.curve.append([step, value, lr, float(norm), step * per_step])
        self._pending.clear()

    def _keep(self) -> None:
        """Measure on validation data and write the checkpoint, where this step is one for it."""
        config = self.config
        if self.step in self.kept and self.group.first:
            self._checkpoint()
        due = self.step % config.validate_every == 0 or self.step == config.steps
        if config.validation and due and not (self.validation and self.validation[-1][0] == self.step):
            self._validate()

    def _checkpoint(self) -> None:
        config = self.config
        folder = self.path / f"step-{self.step}"
        seen = self.step * config.batch
        facts = {"step": self.step, "sequences": seen, "tokens": seen * self.data.sequence_length}
        facts["run"] = config.name
        before = TrainingRun.open(self.path).note(self.step)["sha256"] if (folder / "headwater.json").exists() else None
        if save_checkpoint(folder, self.hf, self.data.tokenizer, facts) != before and before is not None:
            note(f"  step {self.step}: not the bits that were stored before (another number of threads, or machine?)")

    def _validate(self) -> None:
        self._settle()
        self.hf.eval()
        held = {one.name for one in self.config.validation if one.held and self.interventions is not None}
        for name, (rows, at) in self.data.validation.items():
            ids = torch.from_numpy(rows).to(self.device)
            mask = torch.from_numpy(at[1:]).to(self.device)
            loss = torch.zeros((), dtype=torch.float64)
            right, n = 0, len(ids) * int(mask.sum())
            with torch.no_grad():
                for part in ids.split(_VALIDATED_AT_ONCE):
                    on = self._interventions(self.step, part[:, :-1])[0] if name in held else []
                    with self.interventions.session(on, []).installed() if on else contextlib.nullcontext():  # type: ignore[union-attr]
                        logits = self._logits(part[:, :-1])[:, mask].to(getattr(torch, self._loss_type))
                    targets = part[:, 1:][:, mask]
                    summed = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
                    loss += summed.double().cpu()
                    right += int((logits.argmax(dim=-1) == targets).sum())
            self.validation.append([self.step, name, float(loss) / n, right / n])
        self.hf.train()
        last = self.validation[-len(self.data.validation) :]
        note(f"  step {self.step}: " + ", ".join(f"{name} loss {x:.4g}, accuracy {y:.3f}" for _, name, x, y in last))

    def _save(self) -> None:
        self._settle()
        if not self.group.first:
            return
        tensors = {f"weight.{name}": weight.detach() for name, weight in self.hf.named_parameters()}
        stored = self.hf.state_dict().keys()
        tensors |= {f"buffer.{name}": one for name, one in self.hf.named_buffers() if name in stored}
        names = {id(weight): name for name, weight in self.hf.named_parameters()}
        for weight, state in self.adam.state.items():
            for what, value in state.items():
                tensors[f"adam.{what}.{names[id(weight)]}"] = torch.as_tensor(value)
        tensors = {name: one.detach().cpu().contiguous().clone() for name, one in tensors.items()}
        head = {"step": self.step, "curve": self.curve, "validation": self.validation, "seconds": self.seconds}
        save_state(self.path, tensors, head)

    def _resume(self) -> None:
        tensors, head = read_state(self.path)
        try:
            with torch.no_grad():
                for name, weight in self.hf.named_parameters():
                    weight.copy_(tensors[f"weight.{name}"])
                    # cloned: what lies inside the file's bytes is not aligned as torch's own memory is
                    keys = [one for one in ("step", "exp_avg", "exp_avg_sq") if f"adam.{one}.{name}" in tensors]
                    if keys:
                        state = {one: tensors[f"adam.{one}.{name}"].clone() for one in keys}
                        moved = {one: x if one == "step" else x.to(self.device) for one, x in state.items()}
                        if self.device.type == "cuda":
                            moved["step"] = moved["step"].to(self.device)  # the fused kernel keeps it there
                        self.adam.state[weight] = moved
                buffers = dict(self.hf.named_buffers())
                for name, one in tensors.items():
                    if name.startswith("buffer."):
                        buffers[name.removeprefix("buffer.")].copy_(one)
            self.step, self.seconds = int(head["step"]), float(head["seconds"])
            self.curve, self.validation = list(head["curve"]), list(head["validation"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise StoreError(
                f"the state of the training run in {self.path} is damaged",
                got=f"{type(error).__name__}: {error}",
                fix="Remove its folder `state` to start again",
            ) from error

    def _finish(self) -> None:
        run = TrainingRun.open(self.path)
        curve = curve_frame(self.curve)
        facts = {
            "name": self.config.name,
            "steps": self.config.steps,
            "parameters": run.head.get("parameters"),
            "tokens": self.config.steps * self.config.batch * self.data.sequence_length,
            "checkpoints": run.steps,
            "loss": curve["loss"][-1],
        }
        TrainingResult(
            tables={"curve": curve, "validation": validation_frame(self.validation)},
            facts=facts,
            config=self.config.to_dict(),
            provenance=Provenance.collect(seed=self.config.seed, seconds=self.seconds),
        ).save(self.path / "result")


@contextlib.contextmanager
def _same_bits(config: TrainConfig, device: torch.device) -> Generator[None]:
    """Only kernels that give the same bits each time; threads as asked; everything put back, the random state too."""
    before, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng())
        if device.type == "cuda":
            from torch.nn.attention import SDPBackend, sdpa_kernel

            # the memory-efficient kernel has no deterministic backward pass
            stack.enter_context(sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]))
        torch.use_deterministic_algorithms(True)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)
            torch.set_num_threads(threads)


def _arguments(hf: Any) -> set[str]:
    import inspect

    return set(inspect.signature(hf.forward).parameters)
