"""Which weights a request reads: its session's, the base model's, or those that its prompt tells.

`choice` compares two readings of a prompt; here it is decided whether there are two.
"""

from __future__ import annotations

from ponderttt.engine.choice import LEAST_JUDGED, Choices
from ponderttt.engine.config import EngineConfig
from ponderttt.engine.kv_reservations import KVReservations
from ponderttt.engine.request import GenerateRequest
from ponderttt.engine.sequence import Group
from ponderttt.sessions.manager import SessionManager


class WeightsSelector:
    """Decides whether a prompt is judged, and notes the version that a request begins to read.

    Args:
        sessions: whose weights there are.
        choices: what was chosen for earlier prompts.
        kv: what a second reading needs.
        config: the engine's limits.
        remote: a `Generator` draws the tokens; it reads the session's weights.
    """

    def __init__(
        self,
        sessions: SessionManager,
        choices: Choices,
        kv: KVReservations,
        config: EngineConfig,
        remote: bool = False,
    ) -> None:
        self._sessions = sessions
        self._choices = choices
        self._kv = kv
        self._config = config
        self._remote = remote

    def may_judge(self, group: Group) -> bool:
        """Whether the prompt may tell whose weights are to answer it.

        Not where chunks of the answer are learned before the next is drawn: they would be read with
        other weights than those they are learned by. Nor where there is no room for two readings.
        """
        request, ttt, session = group.request, group.ttt, group.session
        if session is None or session.ephemeral or self._remote or ttt.read == "session":
            return False
        if not isinstance(request, GenerateRequest) or request.sampling.max_tokens == 0:
            return False
        if ttt.learns_generated and ttt.when == "inline":
            return False
        enough = len(request.prompt_ids) >= LEAST_JUDGED
        return enough and self._kv.need(group, judges=True) <= self._config.max_kv_tokens

    def expects_to_judge(self, group: Group) -> bool:
        """As `note_version` would find now, before the session is needed."""
        request, session = group.request, group.session
        if session is None or not isinstance(request, GenerateRequest):
            return False
        if not self.may_judge(group):
            return False
        if session.cold:
            return True  # what it has learned is not known yet
        if session.version == 0:
            return False
        learns = group.ttt.learns_prompt and group.ttt.when == "inline"
        digest = self._sessions.digest(session)
        return learns or self._choices.recall(digest, request.prompt_ids) is None

    def note_version(self, group: Group) -> None:
        """What a request begins to read: others may have taught its session while it waited.

        May be called again and again: once a prompt is being read, what was found stays.
        """
        session = group.session
        if session is None or group.background:
            return
        if not group.digest or (session.version != group.version_before and group.is_unread):
            group.version_before = session.version
            group.digest = self._sessions.digest(session)
            self._decide(group)

    def _decide(self, group: Group) -> None:
        """Whether the prompt is to be judged, or what came of it the last time.

        Before any of it is read, and once it is known what the session's weights are.
        """
        if group.is_adapt or not group.sequences:
            return
        session, sequence = group.session, group.sequences[0]
        group.choice, sequence.base = None, False
        # Weights that nothing has changed are the base model's.
        group.judges = session is not None and session.version > 0 and self.may_judge(group)
        # What teaches the session while it is read has losses of several versions.
        if group.judges and not sequence.spans:
            group.choice = self._choices.recall(group.digest, sequence.tokens)
            group.judges = group.choice is None
            sequence.base = group.choice is not None and group.choice.read == "base"
        self._kv.fit(group)
