"""Sessions that really learn, as an environment."""

from __future__ import annotations

from dataclasses import replace
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
    return LiveEnv(core, told, budgets_of(core, *budgets), num_envs, seed=2)


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
        dearest = [max(a for a in Action if row[a]) for row in observation.allowed]
        result = env.step(torch.full((2,), 3))
        assert result.cost.tolist() == [core.costs["nominal"][a] for a in dearest]
        observation = result.observation
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
    def make_it() -> LiveEnv:
        told = [episode(tiny_llama_dir, n, (64, 40)) for n in range(5)]
        return LiveEnv(core, told, budgets_of(core, 3.0, 6.0), 2, seed=2)

    env = make_it()
    env.reset()
    script = torch.randint(0, 4, (12, 2), generator=torch.Generator().manual_seed(2))
    for actions in script[:5]:
        env.step(actions)
    kept = env.state_dict()
    assert kept["deck"], "some episodes of this round are still to come"
    assert all(run["actions"] for run in kept["runs"]), "episodes are under way"
    expected = [env.step(actions) for actions in script[5:]]
    env.close()
    twin = make_it()
    twin.load_state_dict(kept)
    for mine, theirs in zip(twin.state_dict()["runs"], kept["runs"], strict=True):
        assert (mine["actions"], mine["losses"]) == (theirs["actions"], theirs["losses"])
    for actions, first in zip(script[5:], expected, strict=True):
        second = twin.step(actions)
        assert torch.equal(first.done, second.done)
        assert torch.equal(first.cost, second.cost)
        assert torch.equal(first.reward, second.reward)
        assert torch.equal(first.observation.features, second.observation.features)
        assert torch.equal(first.observation.allowed, second.observation.allowed)
        assert torch.equal(first.observation.budget_index, second.observation.budget_index)
    twin.close()
    assert {int(i) for r in expected for i in r.observation.budget_index} == {0, 1}, "both budgets"
    assert any(bool(r.done.any()) for r in expected), "an episode ends after the resumption, too"


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
    # Chunks of five tokens: none of them is ever learned.
    with pytest.raises(InvalidRequestError) as caught:
        LiveEnv(core, [episode(tiny_llama_dir, 0, (5, 5))], budgets_of(core, 2.0), 1)
    assert caught.value.param == "episodes"


def test_episode_without_a_chunk_to_learn_is_left_out(
    core: EngineCore, tiny_llama_dir: Path
) -> None:
    told = [episode(tiny_llama_dir, 0, (5, 5)), episode(tiny_llama_dir, 1, (5, 40, 5))]
    env = LiveEnv(core, told, budgets_of(core, 12.0), 1)
    env.reset()
    for _ in range(3):
        # The only chunk to decide about is the second of 5, 32, 8 and 5 tokens, and the third.
        assert env._runs[0].lane.position == 2
        assert env._runs[0].lane.session.ledger.chunks == 1, "the first is paid for"
        assert not env.step(torch.tensor([1])).done[0]
        assert env.step(torch.tensor([0])).done[0]
    env.close()
    assert core.bank.occupied == 0


def test_chunk_met_again_is_no_decision(core: EngineCore, tiny_llama_dir: Path) -> None:
    first = episode(tiny_llama_dir, 0, (64, 40))
    told = replace(first, documents=(first.documents[0],) * 2)
    env = LiveEnv(core, [told], budgets_of(core, 12.0), 1)
    env.reset()
    assert [bool(env.step(torch.tensor([1])).done[0]) for _ in range(4)] == [False, True] * 2
    # Where nothing was learned, there is something to decide every time.
    assert [bool(env.step(torch.tensor([0])).done[0]) for _ in range(4)] == [False] * 3 + [True]
    env.close()


def test_state_of_other_episodes_is_refused(core: EngineCore, tiny_llama_dir: Path) -> None:
    env = make(core, tiny_llama_dir, 2.0)
    env.reset()
    kept = env.state_dict()
    env.close()
    other = LiveEnv(core, [episode(tiny_llama_dir, 0)], budgets_of(core, 2.0), 2)
    with pytest.raises(InvalidRequestError, match="begun with"):
        other.load_state_dict(kept)
    assert core.bank.occupied == 0


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
        assert torch.equal(rest.network.state_dict()[name], tensor), name
    assert core.bank.occupied == 0
