"""Train a private copy of the shared LoRA on the device's own records. It never leaves, so it needs no noise."""

import numpy as np
import torch

from shared.adapter import Arrays, load_shared, read_shared, shared_parameters
from shared.config import PersonalConfig
from shared.features import Features
from shared.head import Head
from shared.tasks import Targets


def keep(
    head: Head,
    start: Arrays,
    features: Features,
    targets: Targets,
    *,
    personal: PersonalConfig,
    generator: np.random.Generator,
) -> Arrays:
    """No private part: the shared arrays stand."""
    del head, features, targets, personal, generator
    return start


def fine_tune(
    head: Head,
    start: Arrays,
    features: Features,
    targets: Targets,
    *,
    personal: PersonalConfig,
    generator: np.random.Generator,
) -> Arrays:
    """Pass over the records with Adam, starting from the shared arrays.

    Args:
        head: The campaign's head; its trainable tensors are overwritten.
        start: The shared arrays; left as they are.
        features: Prepared backbone outputs of the device's records (n of them, 0 is allowed).
        targets: What they are to predict.
        personal: Passes, records a step, and Adam's rate.
        generator: Of the order of the records.

    Returns:
        Private arrays of the same names and shapes.

    Source:
        Fine-tuning after federation, the strong simple baseline of Yu et al. 2020, arXiv:2002.04758.
    """
    load_shared(head, start)
    optimizer = torch.optim.Adam(shared_parameters(head).values(), lr=personal.learning_rate)
    for _ in range(personal.epochs):
        order = generator.permutation(len(targets))
        for first in range(0, len(order), personal.batch_size):
            rows = order[first : first + personal.batch_size]
            hidden, mask = features.batch(rows)
            wanted = targets.batch(rows, hidden.shape[1])
            loss = head(hidden.to(head.device), mask.to(head.device), wanted.to(head.device)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return read_shared(head)
