"""Environments whose right answers are known, registered under `toy_envs:<Name>-v0`."""

import os
import time

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class Toy(gym.Env):
    """Observes (number of the episode's seed, steps taken); every reward is 1."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Discrete(2)
    terminate_after = None

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.label, self.steps = self.np_random.integers(1000), 0
        return self.observe(), {}

    def step(self, action):
        assert action in self.action_space or np.isnan(action).any()
        self.steps += 1
        return self.observe(), self.reward(action), self.steps == self.terminate_after, False, {}

    def observe(self):
        return np.array([self.label, self.steps], np.float32)

    def reward(self, action):
        return 1.0


class Endless(Toy):
    """The same observation for ever: with a time limit as its only end, V is 1 / (1 - gamma)."""

    def observe(self):
        return np.ones(2, np.float32)


class TwoChoices(Toy):
    """Pays 1 for each of two choices that is right."""

    action_space = spaces.MultiDiscrete([2, 3])

    def reward(self, action):
        return float(np.sum(action == (1, 2)))


class Terminating(Toy):
    """Terminates after 7 steps."""

    terminate_after = 7


class Wears(Toy):
    """Pays by the number of its resets, which it cannot forget."""

    resets = 0

    def reset(self, **kwargs):
        self.resets += 1
        return super().reset(**kwargs)

    def reward(self, action):
        return self.resets / 10


class OldStep(Toy):
    """Returns from `step` what Gym once returned."""

    def step(self, action):
        return self.observe(), 1.0, False, {}


class NanObservation(Toy):
    def observe(self):
        return np.array([self.label, np.nan if self.steps == 3 else 0], np.float32)


class HugeObservation(Toy):
    """Finite, but not as float32."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)

    def observe(self):
        return np.array([1e39, 1e39] if self.steps == 3 else [self.label, 0.0])


class NanFinal(Toy):
    """The observation at the time limit is not a number."""

    def observe(self):
        return np.array([self.label, np.nan if self.steps == 10 else 0], np.float32)


class Guess(Toy):
    """Pays for the action that equals a coin tossed at reset: 5 on average, whoever plays."""

    def __init__(self):
        self.action_space = spaces.Discrete(2)  # of its own, so that seeds matter

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.coin = self.np_random.integers(2)
        return self.observe(), {}

    def reward(self, action):
        return float(action == self.coin)


class NanReward(Toy):
    def reward(self, action):
        return np.nan if self.steps == 3 else 1.0


class DictObservation(Toy):
    observation_space = spaces.Dict(
        {"a": spaces.Box(-1, 1, (2,), np.float32), "b": spaces.Discrete(3)}
    )

    def observe(self):
        return {"a": np.array([0.25, 0.5], np.float32), "b": 1}


class CountsFromFive(Toy):
    """Actions 5 and 6; 6 pays."""

    action_space = spaces.Discrete(2, start=5)

    def reward(self, action):
        return float(action == 6)


class Broken(Toy):
    def reset(self, *, seed=None, options=None):
        raise RuntimeError("no track\nno car")


class RaisesInStep(Toy):
    def reward(self, action):
        if self.steps == 3:
            raise RuntimeError("no track\nno car")
        return 1.0


class LosesItsServer(Toy):
    def reward(self, action):
        raise ConnectionRefusedError("no server")


class Dies(Toy):
    """Takes its process with it."""

    def reward(self, action):
        if self.steps == 3:
            os._exit(1)
        return 1.0


class Hangs(Toy):
    def reward(self, action):
        if self.steps == 3:
            time.sleep(1000)
        return 1.0


class GloballyRandom(Toy):
    """Its randomness is that of NumPy's global generator."""

    def reward(self, action):
        return np.random.random()


class ManyBounds(Toy):
    """A space that prints in several lines."""

    observation_space = spaces.Box(-np.arange(40, dtype=np.float32).reshape(1, -1) / 2, 20.0)


class Bounds(Toy):
    """Bounds of every kind; the reward is the first action that arrives."""

    action_space = spaces.Box(
        np.array([-1, 2, -np.inf, 0, -np.inf], np.float32),
        np.array([3, 2.5, np.inf, np.inf, -7], np.float32),
    )

    def reward(self, action):
        self.actions = [*getattr(self, "actions", []), action]
        return float(action[0])


class WideBounds(Toy):
    """Bounds that stand for none, in float64; the observation is the action that arrived."""

    action_space = spaces.Box(-3.4028234663852886e38, 3.4028234663852886e38, (2,), np.float64)

    def step(self, action):
        return action.astype(np.float32), 1.0, False, False, {}


class FarTarget(Toy):
    """Pays the most, 0, for the action 4.5 of 0 to 6."""

    action_space = spaces.Box(0.0, 6.0, (1,))

    def reward(self, action):
        return -((action.item() - 4.5) ** 2)


class IntegerActions(Toy):
    action_space = spaces.Box(0, 5, (2,), np.int64)


class MatrixActions(Toy):
    action_space = spaces.Box(-1.0, 1.0, (2, 2))


class Staggered(Toy):
    """Ends after 3 to 7 steps, which pay 2 each: the even labels terminate, the odd are cut."""

    def step(self, action):
        obs, reward, _, _, info = super().step(action)
        ended, odd = self.steps == 3 + self.label // 2 % 5, bool(self.label % 2)
        return obs, 2 * reward, ended and not odd, ended and odd, info


class BothFlags(Toy):
    """Terminates at the step at which the time limit truncates it."""

    terminate_after = 10


class FarAway(Toy):
    """Observations far outside of [-10, 10]."""

    def observe(self):
        return np.array([1000, -self.steps], np.float32)


class TupleObservation(Toy):
    observation_space = spaces.Tuple([spaces.Discrete(3), spaces.Box(-1, 1, (2,), np.float32)])

    def observe(self):
        return 2, np.array([0.25, 0.5], np.float32)


class MultiDiscreteObservation(Toy):
    observation_space = spaces.MultiDiscrete([2, 3])

    def observe(self):
        return np.array([1, 0])


class Image(Toy):
    observation_space = spaces.Box(0, 255, (4, 4, 3), np.uint8)

    def observe(self):
        return np.full((4, 4, 3), self.steps, np.uint8)


class Lit(Toy):
    """One quarter of its image, of four, is lit; naming it pays 1."""

    observation_space = spaces.Box(0, 255, (40, 48, 3), np.uint8)

    def __init__(self, render_mode=None):
        self.action_space, self.quarter = spaces.Discrete(4), 0

    def observe(self):
        self.answer, self.quarter = self.quarter, self.np_random.integers(4)
        image = np.zeros((40, 48, 3), np.uint8)
        image[:, 12 * self.quarter : 12 * self.quarter + 12] = 255
        return image

    def reward(self, action):
        return float(action == self.answer)


class RewardsChange(Toy):
    """Keeps the action that it was given, as it is, and pays for another one in the next step."""

    last = None

    def __init__(self):
        self.action_space = spaces.Box(-1, 1, (2,))

    def reward(self, action):
        reward = 0.0 if self.last is None else float(abs(action - self.last).sum())
        self.last = action
        return reward


class Int32Seeds(Toy):
    """Takes no seed above 2**31 - 1."""

    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed if seed is None else int(np.int32(seed)))


class SequenceObservation(Toy):
    """An observation without a fixed length."""

    observation_space = spaces.Sequence(spaces.Discrete(3))

    def observe(self):
        return (1, 2)


class Untidy(Toy):
    """A list for an observation, an array for a reward, arrays of changing length in the info."""

    def step(self, action):
        obs, reward, terminated, truncated, _ = super().step(action)
        info = {"path": np.zeros(self.steps), "note": [None] * self.steps}
        return obs.tolist(), np.array([reward]), terminated, truncated, info

    def reset(self, **kwargs):
        obs, _ = super().reset(**kwargs)
        return obs.tolist(), {"path": np.zeros(self.label % 7)}


class SharesItsArray(Toy):
    """Every observation is written into the same array."""

    def observe(self):
        self.array = getattr(self, "array", np.zeros(2, np.float32))
        self.array[:] = self.label, self.steps
        return self.array


class OldReset(Toy):
    """Returns from `reset` what Gym once returned."""

    def reset(self, **kwargs):
        return super().reset(**kwargs)[0]


class WrongLength(Toy):
    def observe(self):
        return np.zeros(3, np.float32)


class WrongLengthInDict(Toy):
    observation_space = spaces.Dict({"a": spaces.Box(-1, 1, (2,), np.float32)})

    def observe(self):
        return {"a": np.zeros(3, np.float32)}


class WithoutLimit(Toy):
    """Never ends."""

    def reward(self, action):
        assert self.steps < 20_000, "played without end"
        return 1.0


class RaisesInInit(Toy):
    def __init__(self):
        raise RuntimeError("no track")


class RaisesInReset(Toy):
    def reset(self, **kwargs):
        raise RuntimeError("no track")


class RaisesInFirstStep(Toy):
    def reward(self, action):
        raise RuntimeError("no track")


class RaisesGymError(Toy):
    """Raises, in mid-episode, an error of Gymnasium's own kind."""

    def reward(self, action):
        if self.steps == 3:
            raise gym.error.InvalidAction("no track")
        return 1.0


class CallsWrongly(Toy):
    """Calls a function of its own, in mid-episode, with an argument that it does not take."""

    def reward(self, action):
        if self.steps == 3:
            self.observe(color="red")
        return 1.0


class NeedsModule(Toy):
    """Imports, in mid-episode, a package that is not there."""

    def reward(self, action):
        if self.steps == 3:
            import no_such_module  # noqa: F401
        return 1.0


def with_box_actions(cls):
    """The same environment for actions of two numbers; more than 0 in the first is action 1."""

    class WithBoxActions(cls):
        def __init__(self):
            super().__init__()
            self.action_space = spaces.Box(-1.0, 1.0, (2,))

        def reward(self, action):
            return super().reward(int(action[0] > 0))

    return WithBoxActions


for cls in (
    Staggered, BothFlags, FarAway, TupleObservation, MultiDiscreteObservation, Image, Untidy,
    SequenceObservation, SharesItsArray, OldReset, WrongLength, WrongLengthInDict, WithoutLimit,
    RaisesInInit, RaisesInReset, RaisesInFirstStep, RaisesGymError, NeedsModule, CallsWrongly,
    Toy, Endless, Terminating, NanObservation, NanFinal, NanReward, Guess, DictObservation,
    CountsFromFive, Broken, RaisesInStep, LosesItsServer, Dies, Hangs, GloballyRandom, Bounds,
    FarTarget, Wears, OldStep, WideBounds, IntegerActions, MatrixActions, ManyBounds, TwoChoices,
    HugeObservation, Lit, Int32Seeds,
):  # fmt: skip
    limit = None if cls is WithoutLimit else 10
    gym.register(f"{cls.__name__}-v0", entry_point=cls, max_episode_steps=limit)
    box = with_box_actions(cls)
    gym.register(f"{cls.__name__}Box-v0", entry_point=box, max_episode_steps=limit)
gym.register("RewardsChange-v0", entry_point=RewardsChange, max_episode_steps=10)
gym.register(
    "ShortCartPole-v0",
    entry_point="gymnasium.envs.classic_control.cartpole:CartPoleEnv",
    max_episode_steps=20,
)
