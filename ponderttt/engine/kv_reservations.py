"""Positions of KV cache: what requests may need, and what is set aside for them."""

from __future__ import annotations

from ponderttt.engine.config import EngineConfig
from ponderttt.engine.request import GenerateRequest
from ponderttt.engine.resolve import ResolvedTTT
from ponderttt.engine.sequence import Group


class KVReservations:
    """Counts positions, and holds no tensor. What a request may need may be asked in any thread.

    Args:
        config: the engine's limits.
        max_model_len: tokens of prompt and completion together.
        remote: a `Generator` draws the tokens, so that only what is learned or scored is read here.

    `reserved` is the number of positions that all running requests have set aside.
    """

    def __init__(self, config: EngineConfig, max_model_len: int, remote: bool = False) -> None:
        self._config = config
        self._max_model_len = max_model_len
        self._remote = remote
        self.reserved = 0
        self._adapting = 0  # the adapt requests' part of it

    # --- needs ----------------------------------------------------------------------------------

    @property
    def window(self) -> int:
        """Tokens of a document that are read in one go."""
        return min(self._max_model_len, self._config.max_adapting_kv_tokens)

    def capacity(self, request: GenerateRequest, ttt: ResolvedTTT) -> int:
        """Positions that one sequence may need."""
        prompt, new = len(request.prompt_ids), request.sampling.max_tokens
        if not self._remote:
            return prompt + new
        if ttt.learns_generated and ttt.when == "inline":
            return prompt + new
        return prompt if self.reads_prompt_first(request, ttt) else 0

    def reads_prompt_first(self, request: GenerateRequest, ttt: ResolvedTTT) -> bool:
        """Whether the prompt is read here before anything is generated."""
        sampling = request.sampling
        scores = sampling.prompt_logprobs is not None or sampling.max_tokens == 0
        return not self._remote or scores or (ttt.learns_prompt and ttt.when == "inline")

    def readers(self, request: GenerateRequest) -> int:
        """Sequences of the request that are read here: elsewhere, siblings are only drawn."""
        return 1 if self._remote else request.sampling.n

    def need(self, group: Group, judges: bool) -> int:
        """Positions that the request may need as things stand.

        Args:
            group: the request.
            judges: its prompt is read with the base model's weights, too.
        """
        request = group.request
        if isinstance(request, GenerateRequest):
            return self.capacity(request, group.ttt) * self._readers_now(group, request, judges)
        return min(max(len(d) for d in request.documents), self.window)

    def _readers_now(self, group: Group, request: GenerateRequest, judges: bool) -> int:
        """Sequences of the request that hold keys and values, the rival among them."""
        count = self.readers(request)
        if not judges:
            return count
        if group.ttt.learns_prompt and group.ttt.when == "inline":
            # A chunk to be learned keeps what the session has read, whoever answers.
            return count + 1
        # The rival has gone when siblings come.
        return max(count, 2) if group.choice is None else count

    # --- what is set aside: in the engine's thread ----------------------------------------------

    def has_room(self, group: Group, need: int) -> bool:
        """Whether so many positions may be set aside for the request now.

        One request always may, alone. Adapt requests have a part of all positions, which a single
        one of them may exceed.
        """
        config = self._config
        adapting = self._adapting + need
        if group.is_adapt and self._adapting and adapting > config.max_adapting_kv_tokens:
            return False
        return self.reserved == 0 or self.reserved + need <= config.max_kv_tokens

    def reserve(self, group: Group, need: int) -> None:
        """Set positions aside for a request that has none."""
        group.reserved = need
        self.reserved += need
        self._adapting += need if group.is_adapt else 0

    def fit(self, group: Group) -> None:
        """Give back, or take, what the request needs less or more than it has set aside."""
        if not group.reserved or group.is_adapt:
            return
        need = self.need(group, group.judges)
        self.reserved += need - group.reserved
        group.reserved = need

    def release(self, group: Group) -> None:
        """Give back all that the request has set aside."""
        self.reserved -= group.reserved
        self._adapting -= group.reserved if group.is_adapt else 0
        group.reserved = 0
