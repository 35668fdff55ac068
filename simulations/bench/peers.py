"""Time the same private step as others take it: Opacus in its three ways, packages that were made for it, and ours.

One model (MiniLM with LoRA in all blocks), one user's records, one step, clipped and noised. Before anything is timed,
every way takes the step without noise, and its answer is compared with that of Opacus' hooks. Where a package gives
another answer the distance is stated, and its time says nothing about the same step.
"""

import importlib
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import Tensor, nn

from client.training.site import resident_base, resident_dataset, use_threads
from client.training.train import make_trainable, quiet_hooks
from shared.config import Scenario
from shared.datasets import Dataset, Record
from shared.errors import CampaignError
from shared.heads.adapter import Arrays, read_shared, shared_parameters
from shared.models.model import Base
from shared.progress import progress
from simulations.bench.peak import peak_mib
from simulations.bench.simulate import _average
from simulations.bench.step import AllLayers, Silent, _Prepared, _with, distance, pad, plain_step
from simulations.machine import about, spread

PEERS: Mapping[str, str] = {"dp-lora": "dp_lora", "opake-dpsgd": "opake.dpsgd"}  # package -> what it is imported as
_SAME = 1e-4  # relative; further apart is another answer
_OURS = frozenset({"ours_fp32", "ours_mixed", "opacus_hooks"})  # that must agree, or nothing is timed


@dataclass(frozen=True)
class Step:
    """The one step that everybody takes.

    Attributes:
        prepared: A device of its own, at a start where LoRA has gradients.
        token_ids: (n, T), padded to the longest text.
        mask: (n, T).
        targets: (n,).
        noise: Multiplier of the clipping norm; 0 to compare answers.
    """

    prepared: _Prepared
    token_ids: Tensor
    mask: Tensor
    targets: Tensor
    noise: float

    @property
    def model(self) -> AllLayers:
        """Token ids and mask -> predictions (n,)."""
        self.prepared.head.train()
        return AllLayers(self.prepared.head)

    @property
    def trained(self) -> list[nn.Parameter]:
        """What is trained, LoRA and the output."""
        return list(shared_parameters(self.prepared.head).values())

    def sgd(self) -> torch.optim.Optimizer:
        """The optimiser of the policy."""
        return torch.optim.SGD(self.trained, lr=self.prepared.policy.learning_rate)

    def change(self) -> Arrays:
        """What the step has done to the trained tensors."""
        start = self.prepared.start
        return {name: after - start[name] for name, after in read_shared(self.prepared.head).items()}


Way = Callable[[Step], Callable[[], object]]


def _opacus(step: Step, *, functorch: bool = False, onednn: bool = False) -> Callable[[], object]:
    if onednn:  # our products with frozen weights under their hooks: tells a library's part from an algorithm's
        step.prepared.head.quicken("fp32")
    padded = step.token_ids, step.mask, step.targets
    return plain_step(step.prepared, *padded, noise_multiplier=step.noise, functorch=functorch)


def _ghost(step: Step) -> Callable[[], object]:
    policy = step.prepared.policy
    module = GradSampleModuleFastGradientClipping(
        step.model, loss_reduction="sum", max_grad_norm=policy.clip_norm, use_ghost_clipping=True
    )
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(step.trained, lr=policy.learning_rate / policy.denominator),  # it does not divide a sum
        noise_multiplier=step.noise,
        max_grad_norm=policy.clip_norm,
        expected_batch_size=None,
        loss_reduction="sum",
    )
    criterion = DPLossFastGradientClipping(module, optimizer, _Half(), loss_reduction="sum")

    def run() -> None:
        optimizer.zero_grad()
        loss = criterion(module(step.token_ids, step.mask), step.targets)
        with quiet_hooks():
            loss.backward()
        optimizer.step()

    return run


class _Half(nn.Module):
    """Half the squared error of every record, as a criterion with a reduction."""

    reduction = "sum"  # as Opacus asks; it sets another while it calls

    def forward(self, found: Tensor, wanted: Tensor) -> Tensor:
        """(n,), (n,) -> (n,)."""
        return 0.5 * (found - wanted).square()


def _dp_lora(step: Step) -> Callable[[], object]:
    """The package's own hooks and optimiser; it looks at LoRA alone, so its hook is put on the output by hand."""
    hooks = importlib.import_module("dp_lora.grad_sample.grad_sample_module")
    optimizers = importlib.import_module("dp_lora.optimizers.dp_optimizer")
    policy, model = step.prepared.policy, step.model
    trains_first = any("lora_A" in name for name, p in model.named_parameters() if p.requires_grad)
    module = hooks.GradSampleModule(model, method="vanilla" if trains_first else "ffa")
    module._register_hooks(step.prepared.head.output, "output")
    optimizer = optimizers.DPOptimizer(
        step.sgd(),
        noise_multiplier=step.noise,
        max_grad_norm=policy.clip_norm,
        expected_batch_size=policy.denominator,
    )

    def run() -> None:
        optimizer.zero_grad()
        loss = 0.5 * (model(step.token_ids, step.mask) - step.targets).square().sum()
        with quiet_hooks():
            loss.backward()
        optimizer.step(module.get_per_sample_grads())
        module.clear_per_sample_grads()

    return run


def _opake(step: Step) -> Callable[[], object]:
    """Its clipped gradient as a function of the trained tensors, then Gaussian noise and the same optimiser."""
    clipping = importlib.import_module("opake.dpsgd.clipping")
    policy, model, optimizer = step.prepared.policy, step.model, step.sgd()
    noise_std = step.noise * (policy.clip_norm or 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    trained = {names[id(parameter)]: parameter for parameter in step.trained}

    def loss(tensors: dict[str, Tensor], token_ids: Tensor, mask: Tensor, target: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(model, tensors, (token_ids[None], mask[None]))[0]
        return 0.5 * (found - target).square()

    clipped, state = clipping.clipped_grad(loss, clipping_norm=policy.clip_norm, batch_argnums=(1, 2, 3))

    def run() -> None:
        nonlocal state
        tensors = {name: parameter.detach() for name, parameter in trained.items()}
        with warnings.catch_warnings(
            action="ignore", category=UserWarning
        ):  # no batched attention on a CPU; it is timed
            total, state = clipped(tensors, step.token_ids, step.mask, step.targets, state=state)
        for name, parameter in trained.items():
            noise = noise_std * torch.randn_like(parameter)
            parameter.grad = (total.pytree[name] + noise) / policy.denominator
        optimizer.step()

    return run


WAYS: Mapping[str, tuple[str | None, Way]] = {  # name -> the package that must be there beside ours, and the way
    "opacus_hooks": (None, _opacus),
    "opacus_hooks_onednn": (None, lambda step: _opacus(step, onednn=True)),
    "opacus_functorch": (None, lambda step: _opacus(step, functorch=True)),
    "opacus_ghost": (None, _ghost),
    "dp_lora": ("dp-lora", _dp_lora),
    "opake": ("opake-dpsgd", _opake),
}


def measure(*, rounds: int = 5, quiet: bool = False) -> dict[str, Any]:
    """Measure one private step of MiniLM with LoRA in all blocks, as we and others take it.

    Args:
        rounds: How often every way is timed, interleaved.
        quiet: No progress on stderr.

    Returns:
        ``cpu_ms_per_step`` and ``peak_mib`` by way, ``over_opacus_hooks`` in each round, ``answers_differ`` from those
        of Opacus' hooks, ``left_out`` with the reason, machine, versions and commit.

    Raises:
        CampaignError: Ours and Opacus' answers differ.
    """
    use_threads(1)
    scenario = Scenario(name="bench-peers")
    base, dataset = resident_base(scenario.model.base), resident_dataset(scenario.data)
    found = _ways(scenario, base, dataset, _average(dataset))
    times: dict[str, list[float]] = {name: [] for name in found.timed}
    with progress(total=rounds, description="bench peers", unit="round", quiet=quiet) as bar:
        for run in found.timed.values():
            run()  # warm-up
        for _ in range(rounds):
            for name, run in found.timed.items():
                started = time.process_time()
                run()
                times[name].append(time.process_time() - started)
            bar.update(1)
    reference = times["opacus_hooks"]
    packages = [package for package in PEERS if package not in found.left_out]
    return {
        "mode": "fp32 unless said, one thread, CPU-seconds, interleaved",
        "records": len(_average(dataset)),
        "rounds": rounds,
        "cpu_ms_per_step": {name: spread([1000 * s for s in each]) for name, each in times.items()},
        "over_opacus_hooks": {
            name: spread([x / y for x, y in zip(each, reference, strict=True)]) for name, each in times.items()
        },
        "peak_mib": {name: peak_mib("simulations.bench.peers:way_in_a_process", name) for name in found.timed},
        "answers_differ": found.differ,
        "left_out": found.left_out,
        **about("torch", "opacus", "peft", "transformers", *packages),
    }


@dataclass(frozen=True)
class _Found:
    timed: dict[str, Callable[[], object]]
    differ: dict[str, float]
    left_out: dict[str, str]


def _ways(scenario: Scenario, base: Base, dataset: Dataset, records: tuple[Record, ...]) -> _Found:
    """Every way ready to be timed, after its answer was compared."""
    wanted = _answer("opacus_hooks", scenario, base, dataset, records)
    timed: dict[str, Callable[[], object]] = {}
    differ, left_out = dict[str, float](), dict[str, str]()
    for name in ("ours_fp32", "ours_mixed", *WAYS):
        package = WAYS[name][0] if name in WAYS else None
        if package and not _installed(package):
            left_out[package] = f"not installed; pip install '{package}'"
            continue
        differ[name] = distance(_answer(name, scenario, base, dataset, records), wanted)
        limit = 3e-2 if name == "ours_mixed" else _SAME
        if name in _OURS and not differ[name] <= limit:
            raise CampaignError(f"{name} and Opacus must agree to {limit}, they differ by {differ[name]:.1e}.")
        timed[name] = _way(name, _step(scenario, base, dataset, records))
    return _Found(timed, differ, left_out)


def _installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def _step(
    scenario: Scenario, base: Base, dataset: Dataset, records: tuple[Record, ...], *, silent: bool = False
) -> Step:
    everywhere = _with(scenario, blocks=base.num_blocks, trust="local")
    prepared = _Prepared(everywhere, base, dataset, records, randomness=Silent() if silent else None)
    noise = 0.0 if silent else prepared.policy.noise_multiplier
    return Step(prepared, *pad(prepared, base, records), noise=noise)


def _way(name: str, step: Step) -> Callable[[], object]:
    if name in WAYS:
        return WAYS[name][1](step)
    module = make_trainable(step.prepared.head, step.prepared.policy, precision="mixed" if "mixed" in name else "fp32")
    return lambda: step.prepared.train(module, steps=1)


def _answer(name: str, scenario: Scenario, base: Base, dataset: Dataset, records: tuple[Record, ...]) -> Arrays:
    """What a way's step without noise does to the trained tensors."""
    step = _step(scenario, base, dataset, records, silent=True)
    given = _way(name, step)()
    return given if isinstance(given, dict) else step.change()


def way_in_a_process(name: str) -> Callable[[], object]:
    """One way's step, for a process of its own."""
    use_threads(1)
    scenario = Scenario(name="bench-peers")
    base, dataset = resident_base(scenario.model.base), resident_dataset(scenario.data)
    return _way(name, _step(scenario, base, dataset, _average(dataset)))


def lines(measured: dict[str, Any]) -> list[str]:
    """The measurements for a reader."""
    out = [f"{measured['mode']}; {measured['records']} records, {measured['rounds']} rounds"]
    out.append(f"{'':<18}{'ms a step':>11}{'of hooks':>10}{'peak MiB':>10}{'answer off by':>15}")
    for name, each in sorted(measured["cpu_ms_per_step"].items(), key=lambda item: item[1]["median"]):
        ratio, apart = measured["over_opacus_hooks"][name], measured["answers_differ"][name]
        out.append(
            f"{name:<18}{each['median']:>11.1f}{ratio['median']:>10.2f}{measured['peak_mib'][name]:>10.0f}{apart:>15.1e}"
            + ("" if apart <= _SAME or name == "ours_mixed" else "  ANOTHER ANSWER")
        )
    return out + [f"left out: {package}: {why}" for package, why in measured["left_out"].items()]
