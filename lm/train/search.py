"""The largest batch that fits, with each remat policy."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax

from lm.core.batch import Batch
from lm.models.stack import REMAT_POLICIES
from lm.train.experiment import Experiment
from lm.train.plan import DoesNotFit, Plan, mega

PlanOf = Callable[[Experiment, Batch], Plan]
HEADER = "  remat    largest batch  memory per device     at most"


@dataclass(frozen=True)
class Largest:
    """What a remat policy has room for.

    Attributes:
      remat: its name.
      batch_size: rows, 0 if none fit.
      plan: of that batch, or None.
      reason: why there is none, beside its size.
    """

    remat: str
    batch_size: int
    plan: Plan | None
    reason: str = ""

    def __str__(self) -> str:
        """Its line below `HEADER`."""
        line = f"  {self.remat:<8} {self.batch_size:>13,}  "
        plan = self.plan
        if plan is None:
            return line + (self.reason or "not even the smallest fits")
        used = mega(plan.cost.used_bytes)
        line += f"{used} of {mega(plan.chip.memory)}" if plan.chip else used
        if plan.roofline is not None:
            a_day = 86400 * plan.tokens_per_step / plan.roofline.seconds
            line += f"  {plan.mfu_bound:.0%} MFU, {a_day:.3g} tokens a day"
        return line


def largest(fits: Callable[[int], bool], unit: int) -> int:
    """Returns the largest multiple of `unit` that fits, 0 if `unit` itself does not.

    It doubles until one does not fit, and then halves the interval: about 2 log2 of the answer over
    `unit` questions. Whatever is smaller than what fits has to fit too.
    """
    if not fits(unit):
        return 0
    low, high = 1, 2
    while fits(high * unit):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * unit) else (low, middle)
    return low * unit


def largest_batches(
    experiment: Experiment,
    batch: Batch,
    unit: int,
    plan_of: PlanOf,
    policies: Sequence[str] = tuple(REMAT_POLICIES),
    tell: Callable[[str], None] = lambda _: None,
) -> Iterator[Largest]:
    """Yields the largest batch that fits, policy by policy.

    Args:
      experiment: all else is as it says.
      batch: the shapes of its batch.
      unit: rows that a batch is a multiple of.
      plan_of: returns a plan that says whether it fits, or raises `DoesNotFit`.
      policies: names in `REMAT_POLICIES`.
      tell: is given what is being tried, since compiling may take minutes each time.
    """
    for policy in policies:
        yield largest_batch(experiment, batch, unit, plan_of, policy, tell)


def largest_batch(
    experiment: Experiment,
    batch: Batch,
    unit: int,
    plan_of: PlanOf,
    remat: str,
    tell: Callable[[str], None],
) -> Largest:
    """Returns the largest batch that fits with one policy; arguments as of `largest_batches`."""
    plans: dict[int, Plan] = {}

    def fits(rows: int) -> bool:
        tell(f"remat {remat}: do {rows:,} rows fit?")
        config = replace(experiment.train, remat=remat, batch_size=rows)
        try:
            plan = plan_of(replace(experiment, train=config), resized(batch, experiment, rows))
        except DoesNotFit:
            return False
        plans[rows] = plan
        return plan.fits

    try:
        found = largest(fits, unit)
    except ValueError as error:  # Not every compiler takes every policy.
        return Largest(remat, 0, None, str(error))
    return Largest(remat, found, plans.get(found))


def resized(batch: Batch, experiment: Experiment, rows: int) -> Any:
    """Returns the shapes of a batch of another size."""

    def one(leaf: Any) -> jax.ShapeDtypeStruct:
        first = leaf.shape[0] * rows // experiment.train.batch_size
        return jax.ShapeDtypeStruct((first, *leaf.shape[1:]), leaf.dtype)

    return jax.tree.map(one, batch)
