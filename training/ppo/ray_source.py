"""Rollouts in other processes, or on other machines, as Ray actors.

Each actor owns a source of its own (its environments and its random generators); the learner stays
where it is and sends the policy with every request. The batch is the same, number for number, as
that of a `CombinedSource` of the same sources in this process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ponderttt.errors import InvalidRequestError
from training.ppo.environment import State
from training.ppo.rollout import PolicyState, RolloutBatch, RolloutSource, concatenate

Factory = Callable[[], RolloutSource]


class _Worker:
    """What runs in an actor's process."""

    def __init__(self, factory: Factory, threads: int) -> None:
        torch.set_num_threads(threads)
        self._source = factory()

    def describe(self) -> tuple[int, tuple[float, ...]]:
        return self._source.num_envs, self._source.budgets

    def collect(self, policy_state: PolicyState) -> RolloutBatch:
        return self._source.collect(policy_state)

    def state_dict(self) -> State:
        return self._source.state_dict()

    def load_state_dict(self, state: State) -> None:
        self._source.load_state_dict(state)


class RaySource:
    """Several sources as one, asked at the same time.

    Args:
        factories: makes each worker's source, in its process; must be picklable.
        threads: of torch in each worker.
        num_gpus: that Ray reserves for each worker.
        address: of a running Ray cluster, where workers wait until there is room for them;
            None: one on this machine, for this process.
    Raises:
        InvalidRequestError: Ray is not installed, no factory, or different budgets.
    """

    def __init__(
        self,
        factories: Sequence[Factory],
        *,
        threads: int = 1,
        num_gpus: float = 0.0,
        address: str | None = None,
    ) -> None:
        if not factories:
            raise InvalidRequestError("workers", "must be at least 1")
        self._ray = _ray()
        self._owns_cluster = not self._ray.is_initialized()
        if self._owns_cluster:
            self._ray.init(
                address=address,
                include_dashboard=False,
                log_to_driver=False,
                configure_logging=False,
                # Workers share cores where there are fewer of them.
                num_cpus=None if address else len(factories) * threads,
            )
        actor = self._ray.remote(num_cpus=threads, num_gpus=num_gpus)(_Worker)
        self._workers: list[Any] = []
        try:
            for factory in factories:
                self._workers.append(actor.remote(factory, threads))
            described = self._ask("describe")
            if len({budgets for _, budgets in described}) != 1:
                raise InvalidRequestError(
                    "workers", "must all have the same budgets in the same order"
                )
        except BaseException:
            self.close()
            raise
        self._num_envs = sum(count for count, _ in described)
        self._budgets: tuple[float, ...] = described[0][1]

    @property
    def num_envs(self) -> int:
        """Of all workers."""
        return self._num_envs

    @property
    def budgets(self) -> tuple[float, ...]:
        """K, × forward."""
        return self._budgets

    def collect(self, policy_state: PolicyState) -> RolloutBatch:
        """The workers' rollouts side by side, in the workers' order."""
        shared = self._ray.put(policy_state)
        return concatenate(self._ask("collect", shared))

    def state_dict(self) -> State:
        """Of every worker; fits a `CombinedSource` of the same sources, too."""
        return {"sources": self._ask("state_dict")}

    def load_state_dict(self, state: State) -> None:
        """Go on where `state_dict` was called, by as many workers."""
        kept = state["sources"]
        if len(kept) != len(self._workers):
            raise InvalidRequestError(
                "workers", f"{len(self._workers)}; the run that is resumed had {len(kept)}"
            )
        calls = zip(self._workers, kept, strict=True)
        self._ray.get([worker.load_state_dict.remote(one) for worker, one in calls])

    def close(self) -> None:
        """Stop the workers, and Ray where it was started here."""
        for worker in self._workers:
            self._ray.kill(worker)
        self._workers = []
        if self._owns_cluster:
            self._ray.shutdown()

    def _ask(self, method: str, *arguments: Any) -> list[Any]:
        pending = [getattr(worker, method).remote(*arguments) for worker in self._workers]
        answers: list[Any] = self._ray.get(pending)
        return answers


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise InvalidRequestError(
            "workers", "more than one process needs Ray; install ponderttt[ray]"
        ) from error
    return ray
