"""What the agent of one turn has said and the store has not: events, and the draft of a message in the making.

Nobody sees what an agent says before it awaits something, so pieces of a message are looked at then: a message that
is complete by that time was never a draft.
"""

from runtime_service.agent_events import MAX_EVENT_BYTES, event_from, size_of, storable, too_large, utf8_bytes
from runtime_service.agents import AgentOutput, Delta, Message
from runtime_service.live_run import Draft, LiveRun
from runtime_service.runs import EventDraft, EventRole
from runtime_service.store.base import incomplete_event

_ASSISTANT = EventRole.ASSISTANT  # named once: in Python 3.11 the name of an enumeration's member is a call


class Speech:
    """What one turn's agent says, its draft shown to the followers of `live`; whoever executes the turn stores it.

    `pieces` are the deltas that are not looked at yet, always the same list. `refused` says why the agent is not to
    say more. Before the `pending` events come those that are being stored, `in_flight` in number. `output` is the
    agent's last message; `saved_parts` counts those of the draft that the store has.
    """

    __slots__ = (
        "_last_sequence",
        "_live",
        "draft",
        "in_flight",
        "output",
        "pending",
        "pending_bytes",
        "pieces",
        "refused",
        "saved_parts",
    )

    def __init__(self, live: LiveRun, last_sequence: int) -> None:
        self._live = live
        self._last_sequence = last_sequence
        self.pieces: list[Delta] = []
        self.refused: Exception | None = None
        self.pending: list[EventDraft] = []
        self.pending_bytes = 0
        self.in_flight = 0
        self.draft: Draft | None = None
        self.saved_parts = 0
        self.output: str | None = None

    def add(self, output: AgentOutput) -> None:
        """Take what the agent says. Raises what is wrong with it, or with an earlier piece."""
        if self.refused is not None:
            raise self.refused
        if isinstance(output, Delta):
            self.pieces.append(output)
            return
        event = event_from(output)
        size = size_of(event)
        self.pending.append(event)
        self.pending_bytes += size
        if isinstance(output, Message):
            self._drop_draft()
            if event.role is _ASSISTANT:
                self.output = event.content
        elif self.draft is not None:
            self._place_draft(self.draft)

    def read_pieces(self) -> None:
        """Make the pieces that came since the last time part of the draft."""
        if not self.pieces:
            return
        try:
            text = storable("".join([delta.text for delta in self.pieces if delta.text]))
        except Exception as error:  # noqa: BLE001 - whatever an agent says is data
            self.refused, text = error, ""
        self.pieces.clear()
        if text:
            draft = self._begin_draft() if self.draft is None else self.draft
            draft.size += utf8_bytes(text)
            if draft.size > MAX_EVENT_BYTES:
                self.refused = too_large()
            else:
                draft.parts.append(text)
                self._live.show_draft(draft)

    def log_grew(self, last_sequence: int) -> None:
        """Learn the newest sequence of the run's log."""
        self._last_sequence = max(self._last_sequence, last_sequence)
        if self.draft is not None:
            self._place_draft(self.draft)

    # To the store

    def send_pending(self) -> list[EventDraft]:
        """Return what is pending, which is in flight from now on: until `stored` or `not_stored`."""
        events = self._take_pending()
        self.in_flight = len(events)
        return events

    def stored(self) -> None:
        """What was in flight is in the log."""
        self.in_flight = 0

    def not_stored(self, events: list[EventDraft]) -> None:
        """What was in flight is pending again."""
        self.pending[:0] = events
        self.in_flight = 0

    def rest(self) -> tuple[list[EventDraft], str | None]:
        """Return what the agent has said and the store has not, a half message included, and the turn's output."""
        self.read_pieces()
        if self.draft is None:
            return list(self.pending), self.output
        text = self.draft.text
        return [*self.pending, incomplete_event(text)], text

    def take_all(self) -> tuple[list[EventDraft], str | None]:
        """Return what `rest` does, and keep nothing of it."""
        events, output = self.rest()
        self._take_pending()
        self._drop_draft()
        return events, output

    def _take_pending(self) -> list[EventDraft]:
        events, self.pending = self.pending, []
        self.pending_bytes = 0
        return events

    # The draft

    def _begin_draft(self) -> Draft:
        draft = self.draft = Draft()
        self.saved_parts = 0
        self._place_draft(draft)
        return draft

    def _drop_draft(self) -> None:
        self.pieces.clear()
        if self.draft is not None:
            self.draft = None
            self._live.show_draft(None)

    def _place_draft(self, draft: Draft) -> None:
        draft.sequence = self._last_sequence + self.in_flight + len(self.pending) + 1
