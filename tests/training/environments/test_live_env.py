"""Sessions that really learn, as an environment."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ponderttt.adaptation.actions import Action
from ponderttt.engine.core import EngineCore
from ponderttt.errors import InvalidRequestError
from tests.ponderttt.engine import harness
from tests.training.environments.recorded import recorded, rules
from tests.training.rollouts.episodes_of import episode
from training.environments.budgeted import BudgetRules
from training.environments.live_env import LiveEnv
from training.environments.trace_env import TraceEnv
from training.ppo.config import PPOConfig
from training.ppo.environment import VectorEnv, check_observation, check_step
from training.ppo.pid import PIDConfig, PIDController
from training.ppo.trainer import Trainer
from training.rollouts.lanes import Lanes


@pytest.fixture
def core(tiny_llama_dir: Path) -> EngineCore:
    return harness.make_core(tiny_llama_dir)


def budgets_of(core: EngineCore, *budgets: float, enforced: bool = True) -> BudgetRules:
    return BudgetRules(budgets, core.costs, enforced=enforced)


def make(core: EngineCore, directory: Path, *budgets: float, num_envs: int = 2) -> LiveEnv:
    told = [episode(directory, n, (96, 70)) for n in range(2)]
    return LiveEnv(core, told, budgets_of(core, *budgets), num_envs, seed=1)


def losses_of(core: EngineCore, directory: Path, number: int, actions: list[int]) -> list[float]:
    """Of each chunk of an episode, under these actions."""
    lanes = Lanes(core)
    lane = lanes.open(episode(directory, number, (96, 70)))
    losses = []
    for action in actions:
        lanes.read([lane])
        assert lane.scores is not None
        losses.append(lane.scores.loss)
        if action:
            lanes.write([lane], [Action(action)])
        lanes.record(lane, Action(action))
    lanes.close(lane)
    return losses


def test_rewards_are_what_the_session_saves_on_the_next_chunk(
    core: EngineCore, tiny_llama_dir: Path
) -> None:
    env = LiveEnv(core, [episode(tiny_llama_dir, 0, (96, 70))], budgets_of(core, 12.0), 1)
    check_observation(env.reset(), env)
    # The documents' chunks: 32 32 32 | 32 32 6; the last is too short for a decision.
    actions = [1, 0, 2, 4 - 1, 1]
    rewards = []
    for action in actions:
        result = env.step(torch.tensor([action]))
        check_step(result, env)
        rewards.append(float(result.reward))
    assert bool(result.done)
    base = losses_of(core, tiny_llama_dir, 0, [0] * 6)
    own = losses_of(core, tiny_llama_dir, 0, [*actions, 0])
    saved = [b - o for b, o in zip(base, own, strict=True)]
    assert saved[0] == pytest.approx(0.0, abs=1e-6)
    assert rewards == pytest.approx(saved[1:], abs=5e-5)
    assert abs(sum(rewards)) > 1e-3
    env.close()
    assert core.bank.occupied == 0


def test_sessions_that_never_learn_save_nothing(core: EngineCore, tiny_llama_dir: Path) -> None:
    env = make(core, tiny_llama_dir, 2.0)
    env.reset()
    for _ in range(8):
        result = env.step(torch.zeros(2, dtype=torch.int64))
        assert result.reward.tolist() == pytest.approx([0.0, 0.0], abs=1e-6)
        assert result.cost.tolist() == [1.0, 1.0]


def test_budget_is_kept_whatever_is_asked_for(core: EngineCore, tiny_llama_dir: Path) -> None:
    env = make(core, tiny_llama_dir, 2.0)
    observation = env.reset()
    for _ in range(11):
        assert (observation.allowed[:, 0]).all()
        observation = env.step(torch.full((2,), 3)).observation
        for run in env._runs:
            ledger = run.lane.session.ledger
            ahead = run.lane.ahead
            spent = ledger.totals["nominal"] + ahead + 1
            assert spent <= 2.0 * (ledger.chunks + 1 + ahead) + 1e-9


def test_unenforced_budget_allows_everything(core: EngineCore, tiny_llama_dir: Path) -> None:
    told = [episode(tiny_llama_dir, 0, (96, 70))]
    env = LiveEnv(core, told, budgets_of(core, 1.5, enforced=False), 1)
    observation = env.reset()
    while True:
        assert observation.allowed.all()
        result = env.step(torch.tensor([1]))
        observation = result.observation
        if result.done[0]:
            break


def test_resumed_environment_goes_on_exactly(core: EngineCore, tiny_llama_dir: Path) -> None:
    env = make(core, tiny_llama_dir, 3.0, 6.0)
    env.reset()
    script = torch.randint(0, 4, (12, 2), generator=torch.Generator().manual_seed(2))
    for actions in script[:5]:
        env.step(actions)
    kept = env.state_dict()
    expected = [env.step(actions) for actions in script[5:]]
    env.close()
    twin = make(core, tiny_llama_dir, 3.0, 6.0)
    twin.load_state_dict(kept)
    for actions, first in zip(script[5:], expected, strict=True):
        second = twin.step(actions)
        assert torch.equal(first.done, second.done)
        assert torch.equal(first.cost, second.cost)
        torch.testing.assert_close(first.reward, second.reward, atol=2e-5, rtol=0)
        torch.testing.assert_close(
            first.observation.features, second.observation.features, atol=1e-4, rtol=1e-3
        )
    twin.close()


def test_too_small_a_bank_and_no_episode_are_refused(
    core: EngineCore, tiny_llama_dir: Path
) -> None:
    told = [episode(tiny_llama_dir, 0)]
    with pytest.raises(InvalidRequestError) as caught:
        LiveEnv(core, [], budgets_of(core, 2.0), 1)
    assert caught.value.param == "episodes"
    with pytest.raises(InvalidRequestError) as caught:
        LiveEnv(core, told, budgets_of(core, 2.0), core.bank.capacity)
    assert caught.value.param == "num_envs"


CONFIG = PPOConfig(num_steps=4, iterations=4, minibatch_size=8, epochs=2, hidden_sizes=(8,), seed=5)


def trainer(env: VectorEnv, output: Path | None) -> Trainer:
    controller = PIDController(env.budgets, PIDConfig())
    return Trainer(env, CONFIG, controller, output=output, checkpoint_every=2, progress=False)


@pytest.mark.parametrize("kind", ["trace", "live"])
def test_training_resumed_half_way_ends_where_it_would_have(
    core: EngineCore, tiny_llama_dir: Path, tmp_path: Path, kind: str
) -> None:
    def env() -> VectorEnv:
        if kind == "live":
            return make(core, tiny_llama_dir, 1.5, 3.0)
        return TraceEnv([recorded(n, 6) for n in range(3)], rules(1.5, 3.0), 3, seed=2)

    def free(one: VectorEnv) -> None:
        if isinstance(one, LiveEnv):
            one.close()

    first = env()
    whole = trainer(first, None)
    whole.train()
    free(first)

    class StoppedError(Exception):
        pass

    def stop(stats: object) -> None:
        if half.iteration == 2:
            raise StoppedError

    second = env()
    half = trainer(second, tmp_path)
    half._on_iteration = stop
    with pytest.raises(StoppedError):
        half.train()
    free(second)

    third = env()
    rest = trainer(third, tmp_path)
    assert rest.resume() == 2
    rest.train()
    free(third)
    for name, tensor in whole.network.state_dict().items():
        if kind == "trace":
            assert torch.equal(rest.network.state_dict()[name], tensor), name
        else:
            torch.testing.assert_close(
                rest.network.state_dict()[name], tensor, atol=1e-4, rtol=1e-3
            )
