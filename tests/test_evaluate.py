"""evaluate: whole episodes, raw returns, seeds of its own."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import ONCE, load

CPU = torch.device("cpu")


def make_agent(script, args):
    env = script.make_env(args)
    torch.manual_seed(0)
    return script.Agent(env.observation_space, env.action_space, args.norm_obs)


def test_known_returns(script, small, toy):
    for name, expected in (("Toy", 10), ("Terminating", 7)):
        args = dataclasses.replace(small, **toy(name))
        for agent in (None, make_agent(script, args)):
            returns = script.evaluate(agent, args, 5, 1, CPU)
            assert returns.dtype == np.float64 and returns.tolist() == [expected] * 5


@pytest.mark.parametrize("episodes", [1, 3, 4, 6, 9])
def test_rounds_give_the_episodes_that_one_at_a_time_gives(script, small, toy, episodes):
    """Of 3 to 7 steps: no favour to the short ones, none played twice, none left out."""
    args = dataclasses.replace(small, **toy("Staggered"))
    agent = make_agent(script, args)
    together = script.evaluate(agent, args, episodes, 3, CPU)
    alone = script.evaluate(agent, dataclasses.replace(args, num_envs=1), 9, 3, CPU)
    assert together.shape == (episodes,)
    assert together.tolist() == alone[:episodes].tolist()
    assert len(set(alone)) > 2


def test_episodes_are_the_agents_own(script, small):
    """Played by hand, with the most probable actions, the same seeds give the same returns."""
    agent, seeds = make_agent(script, small), []
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_env = script.make_env

        def spying_make_env(*args, **kwargs):
            env = make_env(*args, **kwargs)
            reset = env.unwrapped.reset
            env.unwrapped.reset = lambda *, seed=None, options=None: (
                seeds.append(seed) or reset(seed=seed, options=options)
            )
            return env

        monkeypatch.setattr(script, "make_env", spying_make_env)
        together = script.evaluate(agent, small, 6, 3, CPU)
    seeds = [seed for seed in seeds if seed is not None]
    assert len(set(seeds)) == len(seeds) == 6
    for seed, expected in zip(seeds, together, strict=True):
        env = script.make_env(small, training=False)
        (obs, _), total, ended = env.reset(seed=seed), 0.0, False
        while not ended:
            obs = torch.as_tensor(obs, dtype=torch.float32).unsqueeze(0)
            action = agent.get_deterministic_action(obs)[0].numpy(force=True)
            obs, reward, terminated, truncated, _ = env.step(action)
            total, ended = total + reward, terminated or truncated
        assert total == pytest.approx(expected, rel=1e-5)
    assert len(set(together)) > 1


def test_seed_fixes_the_episodes(script, small):
    for agent in (None, make_agent(script, small)):
        first = script.evaluate(agent, small, 20, 1, CPU)
        torch.manual_seed(5)
        np.random.seed(5)
        assert np.array_equal(first, script.evaluate(agent, small, 20, 1, CPU))
        assert not np.array_equal(first, script.evaluate(agent, small, 20, 2, CPU))


def test_random_actions_are_independent_of_the_environment(script, small, toy):
    """Seeded alike, environment and action space would toss the same coins."""
    args = dataclasses.replace(small, **toy("Guess"))
    returns = script.evaluate(None, args, 400, 1, CPU)
    assert abs(returns.mean() - 5) < 5 * np.sqrt(10 / 4 / 400)


def test_evaluation_seeds_are_never_trained_on(script, small, monkeypatch):
    seeds = {"train": set(), "evaluate": set()}
    make_env, phase = script.make_env, "train"

    def spying_make_env(*args, **kwargs):
        env = make_env(*args, **kwargs)
        original = env.unwrapped.reset

        def reset(*, seed=None, options=None):
            if seed is not None:
                seeds[phase].add(seed)
            return original(seed=seed, options=options)

        env.unwrapped.reset = reset
        return env

    monkeypatch.setattr(script, "make_env", spying_make_env)
    envs = script.make_vector_env(small)
    for iteration in range(200):
        script.reset_envs(envs, small, iteration)
    phase = "evaluate"
    for seed in range(20):
        script.evaluate(None, small, 20, seed, CPU)
    assert len(seeds["train"]) == 800 and len(seeds["evaluate"]) == 400
    assert max(seeds["train"]) < 2**31 <= min(seeds["evaluate"])


def test_normalizer_is_used_and_left_alone(script, small, toy):
    args = dataclasses.replace(small, **toy("Toy"), norm_obs=True)
    agent, seen = make_agent(script, args), []
    agent.normalize.update(100 * torch.randn(50, 4, 2))
    before = {name: tensor.clone() for name, tensor in agent.state_dict().items()}
    agent.normalize.register_forward_hook(lambda module, inputs, output: seen.append(output))
    script.evaluate(agent, args, 3, 1, CPU)
    assert all(torch.equal(before[name], tensor) for name, tensor in agent.state_dict().items())
    assert seen and all(obs.abs().max() < 15 for obs in seen), "labels up to 1000 are divided"


def test_environments_are_made_for_evaluation(script, small, monkeypatch):
    """Not as for training; and drawn one at a time with --render."""
    make_vector_env, made = script.make_vector_env, []

    def spy(args, training=True, render_mode=None):
        made.append((args.num_envs, training, render_mode))
        return make_vector_env(args, training)

    monkeypatch.setattr(script, "make_vector_env", spy)
    script.evaluate(None, small, 4, 1, CPU)
    script.evaluate(None, dataclasses.replace(small, render=True), 2, 1, CPU)
    assert made == [(4, False, None), (1, False, "human")]


def test_episode_without_end_is_cut_at_10_000_steps(script, small, toy):
    args = dataclasses.replace(small, **toy("WithoutLimit"), num_envs=1)
    assert script.evaluate(None, args, 1, 1, CPU).tolist() == [10_000]
    assert script.make_env(args).spec.max_episode_steps is None, "training has no limit"


def test_command_repeats_the_result(trained, main, in_tmp):
    code, output, _ = main("--evaluate", trained.path)
    assert code == 0
    assert output.splitlines()[-1:] == trained.output.splitlines()[-1:]
    assert list(in_tmp.iterdir()) == []
    code, output, _ = main("--evaluate", trained.path, "--eval-episodes", 7)
    assert code == 0 and "over 7 episodes" in output


def test_an_agent_of_a_gpu_is_evaluated_without_one(trained, main, in_tmp):
    checkpoint = load(trained.path)
    checkpoint["args"]["cuda"] = True
    torch.save(checkpoint, in_tmp / "gpu.pt")
    code, output, errors = main("--evaluate", in_tmp / "gpu.pt")
    assert code == 0 and output.splitlines()[-1:] == trained.output.splitlines()[-1:], errors


def test_command_takes_another_number_of_environments(trained, main, in_tmp):
    """Even so few that training could not split a rollout of theirs; whole numbers are numbers."""
    checkpoint = load(trained.path)
    checkpoint["args"] |= {"num_minibatches": 32, "ent_coef": 0}
    torch.save(checkpoint, in_tmp / "many.pt")
    code, output, errors = main("--evaluate", in_tmp / "many.pt", "--num-envs", 1)
    assert code == 0 and output.splitlines()[-1:] == trained.output.splitlines()[-1:], errors


def test_acting_builds_no_graph(script, small):
    agent, modes = make_agent(script, small), []
    agent.get_deterministic_action = lambda obs: (
        modes.append(torch.is_grad_enabled()) or script.Agent.get_deterministic_action(agent, obs)
    )
    script.evaluate(agent, small, 1, 1, CPU)
    assert set(modes) == {False}


@ONCE
def test_render(trained, main):
    code, output, errors = main("--evaluate", trained.path, "--render", "--eval-episodes", 1)
    assert code == 0 and "over 1 episodes" in output, errors


def test_command_plays_100_episodes(script, small, main, monkeypatch):
    """The checkpoint of a run without evaluation does not hold their number."""
    monkeypatch.setattr(script, "evaluate", lambda agent, args, episodes, *_: np.ones(episodes))
    result = script.train(dataclasses.replace(small, total_timesteps=64))
    path = f"{result['run_dir']}/agent.pt"
    assert load(path)["args"]["eval_episodes"] == 0
    assert "over 100 episodes" in main("--evaluate", path)[1]
    assert "over 2 episodes" in main("--evaluate", path, "--eval-episodes", 2)[1]
