"""What a device adds for itself, and what it then predicts. It never leaves, so it needs no noise."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch

from client.personal.finetune import (
    ditto,
    fine_tune,
    fine_tune_private,
    fine_tune_second,
    fit_offset,
    keep,
    load_tensors,
    predict_with,
)
from client.personal.persona import weights_of
from client.personal.tagging import PrivateTags, fit_tags, keep_tags
from client.runtime.memory import Memory, make_memory
from client.runtime.retrieval import RETRIEVERS, Texts, cosines, local_share, recall
from shared.config import PersonaConfig, PersonalConfig
from shared.errors import ScenarioError
from shared.heads.adapter import Arrays
from shared.heads.causal import CausalHead
from shared.heads.lora import FROZEN_PARTS, PRIVATE_PARTS
from shared.heads.rating import RatingHead
from shared.heads.scoring import persona_predictions, text_predictions
from shared.heads.tagging import TaggingHead
from shared.heads.tasks import Scores, Targets
from shared.models.features import Features
from shared.registry import lookup


@dataclass(frozen=True)
class PrivateOutput:
    """A private correction of scope ``private``: prediction = shared prediction + features @ weight + bias.

    Attributes:
        weight: (d,) float64, on the head's pooled features.
        memory: Of the user's own records, which an exported head carries; ``predict`` leaves it out.
    """

    weight: np.ndarray
    bias: float
    memory: Memory | None = None

    def predict(self, features: np.ndarray, shared: np.ndarray) -> np.ndarray:
        """Features (n, d) and shared predictions (n,) -> personal predictions (n,)."""
        return np.asarray(shared + features.astype(np.float64, copy=False) @ self.weight + self.bias)


def fit_none(
    features: np.ndarray, residuals: np.ndarray, *, mean: np.ndarray, personal: PersonalConfig
) -> PrivateOutput:
    """No private part: the shared prediction stands."""
    del residuals, mean, personal
    return PrivateOutput(np.zeros(features.shape[1]), 0.0)


def fit_ridge(
    features: np.ndarray, residuals: np.ndarray, *, mean: np.ndarray, personal: PersonalConfig
) -> PrivateOutput:
    """Fit a bias, then a ridge regression of what is left, both in closed form.

    Args:
        features: (n, d) pooled features of this device's records; n = 0 is allowed.
        residuals: (n,) target minus shared prediction.
        mean: (d,) public centre of the features.
        personal: Strengths of the two penalties.

    Returns:
        The private output; with no record it is zero.

    Source:
        Ridge regression in its dual form: w = X' (X X' + ridge I)^-1 y, an n x n system, n < d on most devices.
    """
    count, width = features.shape
    if not count:
        return PrivateOutput(np.zeros(width), 0.0)
    level = float(residuals.sum()) / (count + personal.bias_shrinkage)
    centred = features.astype(np.float64, copy=False) - mean
    gram = centred @ centred.T  # (n, n)
    dual = np.linalg.solve(gram + personal.ridge * np.eye(count), residuals - level)
    weight = centred.T @ dual
    return PrivateOutput(weight, level - float(mean @ weight))


@dataclass(frozen=True)
class PersonalMethod:
    """How a device makes its private part and predicts with it, and what rule P1 must know of it.

    Predictions of numbers come from the first of ``remember``, ``fit`` and ``adapt`` that a method has.

    Attributes:
        fit: As ``fit_ridge``: features (n, d), residuals (n,), ``mean``, ``personal`` -> a private output.
        read_by_shared_step: Whether shared training ever reads what the method made of the same records. Stated by the
            author; anything but False is refused where records are to be protected.
        summary: One line for people.
        adapt: As ``client.personal.finetune.fine_tune``: private copies of the head's tensors, for language models too.
        mix: As ``share_by_meaning``: weight (m,) of the adapted tensors for each text asked, beside the shared ones.
        remember: As ``remember``: what is added to shared predictions (m,) is looked up in the device's own records.
        tags: As ``client.personal.tagging.fit_tags``, for task ``tagging``; None: not for it.
        private: Parts of the head that are trained in the step of the shared ones, and stay on the device.
        frozen: Parts of the head that the shared step leaves at the public start.
    """

    fit: Callable[..., PrivateOutput] | None
    read_by_shared_step: bool
    summary: str
    adapt: Callable[..., Arrays] | None = None
    mix: Callable[..., np.ndarray] | None = None
    remember: Callable[..., np.ndarray] | None = None
    tags: Callable[..., PrivateTags] | None = None
    private: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()

    @property
    def closed(self) -> bool:
        """Whether pooled features are all that predictions of numbers need."""
        return self.fit is not None and self.remember is None

    def __call__(
        self, features: np.ndarray, residuals: np.ndarray, *, mean: np.ndarray, personal: PersonalConfig
    ) -> PrivateOutput:
        """Fit.

        Raises:
            ScenarioError: The method has no closed form, or its result is not a finite private output of the features'
                width.
        """
        if self.fit is None:
            raise ScenarioError(
                f"personal.method = {personal.method!r} must have a closed form here; choose fine-tune."
            )
        # a copy: the centre is part of the public start, which nothing fitted on a device may change
        found = self.fit(features, residuals, mean=mean.copy(), personal=personal)
        width = features.shape[1]
        if not (
            isinstance(found, PrivateOutput)
            and _is_finite(found.weight, shape=(width,))
            and _is_finite(found.bias, shape=())
        ):
            raise ScenarioError(
                f"personal.method = {personal.method!r} must give a finite PrivateOutput of width {width}, "
                f"got {type(found).__name__}; choose another or mend it."
            )
        return found


def _is_finite(values: object, *, shape: tuple[int, ...]) -> bool:
    array = np.asarray(values)
    return array.shape == shape and array.dtype.kind in "fiu" and bool(np.isfinite(array).all())


def fit_output(
    head: RatingHead, pooled: np.ndarray, shared: np.ndarray, targets: np.ndarray, *, personal: PersonalConfig
) -> PrivateOutput:
    """The private output of one user, fitted on all of the user's training rows.

    Args:
        head: Holds the public centre of the features.
        pooled: (n, d), with ``shared`` (n,) as ``text_predictions`` gives them.
        shared: Shared predictions of the rows.
        targets: (n,) what the user said.
        personal: The method and its strengths.

    Raises:
        ScenarioError: See ``PersonalMethod``.
    """
    mean: np.ndarray = head.mean.detach().cpu().numpy()
    return personal_method(personal.method)(pooled, targets - shared, mean=mean, personal=personal)


def fit_private(
    head: RatingHead,
    arrays: Arrays,
    inputs: Features,
    targets: Targets,
    *,
    personal: PersonalConfig,
    generator: np.random.Generator,
    persona: PersonaConfig | None = None,
    profile: Mapping[str, str] | None = None,
    texts: Sequence[str] = (),
) -> PrivateOutput:
    """The private part of one user as a head file holds it, made of all of the user's training rows.

    Args:
        head: Left with shared arrays in it; where the method adapts its tensors, with the user's.
        arrays: The shared ones.
        inputs: Backbone outputs of the user's texts, not prepared.
        targets: What the user said.
        personal: The method and its strengths.
        generator: Of the order of records, where the method passes over them.
        persona: Of the scenario; the head is left with the user's weights of the personas.
        profile: What the user declared.
        texts: The user's texts, where the method compares their words.

    Returns:
        What to add to the output that the head then has.

    Raises:
        ScenarioError: The method's predictions are no single set of tensors; see ``PersonalMethod``.
    """
    check_export(personal.method)
    method = personal_method(personal.method)
    said = targets.batch(np.arange(len(targets)), 0).numpy().astype(np.float64)
    pooled, shared = text_predictions(head, arrays, inputs)
    if persona is not None and persona.count:
        each = persona_predictions(head, pooled)
        weights = weights_of(each, said, persona=persona, profile=profile or {})
        shared, head.membership = each @ weights, torch.from_numpy(weights).float()
    if method.fit is not None:
        return fit_output(head, pooled, shared, said, personal=personal)
    if method.remember is not None:
        centre: np.ndarray = head.mean.detach().cpu().numpy()
        memory = make_memory(pooled, texts, said - shared, centre=centre, personal=personal)
        return PrivateOutput(np.zeros(pooled.shape[1]), 0.0, memory)
    adapt = cast(Callable[..., Arrays], method.adapt)
    load_tensors(head, adapt(head, arrays, head.prepare(inputs), targets, personal=personal, generator=generator))
    return PrivateOutput(np.zeros(pooled.shape[1]), 0.0)


def fit_labels(
    head: TaggingHead, pooled: np.ndarray, shared: np.ndarray, targets: np.ndarray, *, personal: PersonalConfig
) -> PrivateTags:
    """The private output of one user in task ``tagging``; as ``fit_output``, with shared logits (n, K) and labels (n,).

    Raises:
        ScenarioError: The personal method has no form for the task, or gives no finite private output of its shape.
    """
    check_task(personal.method, "tagging")
    fit = cast(Callable[..., PrivateTags], personal_method(personal.method).tags)
    mean: np.ndarray = head.mean.detach().cpu().numpy().copy()
    found, labels = fit(pooled, shared, targets, mean=mean, personal=personal), shared.shape[1]
    if not (_is_finite(found.weight, shape=(pooled.shape[1], labels)) and _is_finite(found.bias, shape=(labels,))):
        raise ScenarioError(
            f"personal.method = {personal.method!r} must give finite PrivateTags of {labels} labels; choose another or "
            "mend it."
        )
    return found


def predict_user(
    known: Texts,
    targets: np.ndarray,
    asked: Texts,
    *,
    mean: np.ndarray,
    personal: PersonalConfig,
    head: RatingHead | None = None,
    arrays: Arrays | None = None,
    generator: np.random.Generator | None = None,
) -> np.ndarray:
    """Personal predictions of one user, unclipped: the one way of simulations and devices.

    Args:
        known: The user's own texts, in the order of time; none is allowed.
        targets: (n,) what the user said of them.
        asked: Texts to predict for (m of them).
        mean: (d,) public centre of the features.
        personal: The method and its strengths.
        head: Of the campaign, where the method passes it again; a private part is left in it.
        arrays: Shared arrays that ``features`` were made with, where the method starts from them.
        generator: Of the order of records, where the method passes over them.

    Returns:
        (m,) float64.

    Raises:
        ScenarioError: The method is unknown, has no form for this task, or gives nothing finite.

    Guarantee:
        With no record every built-in method gives the shared predictions.
    """
    method = personal_method(personal.method)
    if method.closed:
        found = method(known.features, targets - known.shared, mean=mean, personal=personal)
        return found.predict(asked.features, asked.shared)
    if method.remember is not None:
        added = method.remember(known, targets - known.shared, asked, mean=mean.copy(), personal=personal)
        predicted = asked.shared + _checked(added, len(asked), personal)
    else:
        predicted = _predict_adapted(known, targets, asked, mean, personal, head, arrays, generator)
    return _checked(predicted, len(asked), personal)


def _predict_adapted(
    known: Texts,
    targets: np.ndarray,
    asked: Texts,
    mean: np.ndarray,
    personal: PersonalConfig,
    head: RatingHead | None,
    arrays: Arrays | None,
    generator: np.random.Generator | None,
) -> np.ndarray:
    method = personal_method(personal.method)
    if method.adapt is None or head is None or arrays is None or generator is None or asked.inputs is None:
        raise ScenarioError(f"personal.method = {personal.method!r} has no form here; choose fine-tune.")
    own = targets if known.offset is None else targets - known.offset
    private = method.adapt(head, arrays, known.inputs, Scores(own.tolist()), personal=personal, generator=generator)
    if method.mix is None:
        said = predict_with(head, private, asked.inputs)
    else:
        weights = _checked(
            method.mix(known.features, asked.features, mean=mean, personal=personal), len(asked), personal
        )
        if list(private) == ["output.weight"] and not len(head.blocks):  # linear: a mixture of what the two predict
            shared, alone = (predict_with(head, tensors, asked.inputs) for tensors in (arrays, private))
            said = np.asarray(shared + weights * (alone - shared))
            return said if asked.offset is None else said + asked.offset
        parts = [
            predict_with(head, mixed(arrays, private, weight), asked.inputs.select([row]))
            for row, weight in enumerate(weights.tolist())
        ]
        said = np.concatenate([np.zeros(0), *parts])
    return said if asked.offset is None else said + asked.offset


def mixed(shared: Arrays, private: Arrays, weight: float) -> Arrays:
    """Shared tensors moved towards private ones by a weight from 0 to 1."""
    return {
        name: (shared[name] + weight * (array - shared[name])).astype(array.dtype) for name, array in private.items()
    }


def _checked(values: np.ndarray, count: int, personal: PersonalConfig) -> np.ndarray:
    if not _is_finite(values, shape=(count,)):
        raise ScenarioError(f"personal.method = {personal.method!r} must give {count} finite numbers; mend it.")
    return np.asarray(values)


def remember(
    known: Texts, residuals: np.ndarray, asked: Texts, *, mean: np.ndarray, personal: PersonalConfig
) -> np.ndarray:
    """What the scenario's retriever finds for the texts asked; see ``client.runtime.retrieval.recall``."""
    similarities = RETRIEVERS[personal.retriever](known, asked, mean=mean)
    return recall(similarities, residuals, personal=personal)


def share_by_meaning(known: np.ndarray, asked: np.ndarray, *, mean: np.ndarray, personal: PersonalConfig) -> np.ndarray:
    """FedDPA's weight (m,) of features asked (m, d) among known ones (n, d); see ``local_share``."""
    return local_share(cosines(known, asked, mean=mean), personal=personal)


def fit_lora(
    head: CausalHead,
    arrays: Arrays,
    features: Features,
    targets: Targets,
    *,
    personal: PersonalConfig,
    generator: np.random.Generator,
) -> Arrays:
    """The LoRA of one user, fine-tuned from shared arrays on all of the user's training rows; as ``fine_tune``.

    Raises:
        ScenarioError: The personal method has no form for language models.
    """
    check_task(personal.method, "generation")
    adapt = cast(Callable[..., Arrays], personal_method(personal.method).adapt)
    return adapt(head, arrays, features, targets, personal=personal, generator=generator)


PERSONAL_METHODS: dict[str, PersonalMethod] = {
    "none": PersonalMethod(fit_none, read_by_shared_step=False, summary="no private part", adapt=keep, tags=keep_tags),
    "fine-tune": PersonalMethod(
        fit_ridge,
        read_by_shared_step=False,
        summary="a private output layer (a language model: a private copy of the LoRA), fitted after the federation",
        adapt=fine_tune,
        tags=fit_tags,
    ),
    "ditto": PersonalMethod(
        None,
        read_by_shared_step=False,
        summary="Li et al. 2021, arXiv:2012.04221: a private copy that fits the records and stays near the shared part",
        adapt=ditto,
    ),
    "feddpa": PersonalMethod(
        None,
        read_by_shared_step=False,
        summary="Yang et al. 2024, arXiv:2403.19211: a second adapter, weighed by how familiar a text is",
        adapt=fine_tune_second,
        mix=share_by_meaning,
    ),
    "retrieval": PersonalMethod(
        None,
        read_by_shared_step=False,
        summary="a memory of the device's own records: the nearest ones correct a prediction",
        remember=remember,
    ),
    "fedbabu": PersonalMethod(
        fit_ridge,
        read_by_shared_step=False,
        summary="Oh et al. 2022, arXiv:2106.06042: the output stays at its public start until a device fits its own",
        frozen=FROZEN_PARTS["fedbabu"],
    ),
    "fedper": PersonalMethod(
        fit_ridge,
        read_by_shared_step=False,
        summary="Arivazhagan et al. 2019, arXiv:1912.00818: every device trains an output of its own beside the LoRA",
        private=PRIVATE_PARTS["fedper"],
    ),
    "fedsa-lora": PersonalMethod(
        None,
        read_by_shared_step=False,
        summary="Guo et al. 2025, arXiv:2410.01463: LoRA's A is shared, B and the output stay on the device",
        adapt=fine_tune_private,
        private=PRIVATE_PARTS["fedsa-lora"],
    ),
    "user-embedding": PersonalMethod(
        None,
        read_by_shared_step=False,
        summary="Li et al. 2024, arXiv:2402.05133: a vector shared by all plus the user's own, on learnt factors",
        adapt=fit_offset,
        private=PRIVATE_PARTS["user-embedding"],
    ),
}


def check_task(name: str, task: str) -> None:
    """Raise ``ScenarioError`` where a personal method has no form for a task."""
    if task == "tagging":
        missing = personal_method(name).tags is None
    elif task == "ranking":
        missing = name not in ("none", "fine-tune")  # see client.personal.profile
    else:
        method = personal_method(name)  # a mixture differs from text to text, and so would a generated token's head
        missing = task in ("generation", "preference") and (method.adapt is None or method.mix is not None)
    if missing:
        raise ScenarioError(f"personal.method = {name!r} has no form for task {task!r}; choose another.")


def check_export(name: str) -> None:
    """Raise ``ScenarioError`` where a personal method's prediction is nothing that a head file can hold."""
    method = personal_method(name)
    if method.mix is not None or method.remember not in (None, remember):
        raise ScenarioError(
            f"personal.method = {name!r} weighs tensors anew for every text, which no exported head does; choose "
            "fine-tune, ditto or retrieval, or set export.users = 0."
        )


def personal_method(name: str) -> PersonalMethod:
    """A personal method by name, built in or installed.

    Raises:
        ScenarioError: Nobody registers it, or its package is broken.
    """
    return lookup("personal_methods", name, PERSONAL_METHODS, PersonalMethod)
