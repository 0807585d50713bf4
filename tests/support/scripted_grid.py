"""A recording Grid whose nodes may answer anything, any number of times, in anybody's name."""

from collections.abc import Callable, Iterable, Sequence

from flwr.app import Error, Message, RecordDict

from tests.support.recording_grid import RecordingGrid

Answer = RecordDict | Error | Message
Script = Callable[[Message], Answer | Sequence[Answer] | None]


class ScriptedGrid(RecordingGrid):
    """Calls ``script(message)`` for each push and hands out whatever it returns.

    None stands for a node that never answers in time, a list for one that answers several times. A
    Message goes out as it is, so that it may name another node, round or group.

    Attributes
    ----------
    batches:
        The messages of each call of ``push_messages``.
    """

    def __init__(self, script: Script, num_nodes: int) -> None:
        super().__init__(lambda _: None, num_nodes)
        self.script = script
        self.batches: list[list[Message]] = []
        self._answers: dict[str, list[Message]] = {}

    def push_messages(self, messages: Iterable[Message]):
        batch = list(messages)
        self.batches.append(batch)
        self.pushed.extend(batch)
        ids = []
        for message in batch:
            message_id = str(next(self._ids))
            message.metadata.__dict__["_message_id"] = message_id
            answers = self.script(message)
            if answers is not None:
                listed = answers if isinstance(answers, list | tuple) else [answers]
                self._answers[message_id] = [
                    a if isinstance(a, Message) else Message(a, reply_to=message) for a in listed
                ]
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids):
        found = [reply for i in message_ids for reply in self._answers.pop(i, [])]
        self.replied.extend(found)
        return found


def answer_in_name_of(node_id: int, content: RecordDict | Error, *, group: str) -> Message:
    """Return a reply that says it comes from ``node_id`` and belongs to ``group``."""
    question = Message(RecordDict(), node_id, "train", group_id=group)
    return Message(content, reply_to=question)
