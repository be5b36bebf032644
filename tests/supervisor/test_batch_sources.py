"""What an alarm's batch consisted of is journalled where the alarm was, whatever has come since."""

from opt_logbook.record.events import Entry
from opt_logbook.record.node_events import ActionWithheld
from opt_logbook.record.stability_events import BatchSource, BatchSources, InstabilitySeen
from opt_logbook.story.attempt import describe_entries

from opt_train.supervisor.inputs import BatchRead
from opt_train.supervisor.shell.batch_reader import alarm_of
from tests.supervisor.started import a_run

READ = BatchRead("1.00", 41, "rise", 9, (BatchSource("/t/a.jsonl line 7", 3, 0.625),))


def test_it_stands_at_the_alarm_s_attempt_and_step() -> None:
    world = a_run().until_step(4)
    world.feed(READ)
    world.until(BatchSources)
    [entry] = world.entries(BatchSources)
    assert (entry.attempt, entry.step) == ("1.00", 41)
    assert entry.event == BatchSources("rise", 9, READ.sources)


def test_the_chronicle_names_the_files() -> None:
    event = BatchSources("rise", 3, (*READ.sources, BatchSource("", 12, 0.25)))
    [told] = describe_entries([Entry(1.0, "1.00", 41, event)], None)
    assert told.text.endswith(
        "the batch of step 41, at the alarm rise, had 3 documents: /t/a.jsonl line 7 (62.5%), "
        "document 12 (25.0%) and 1 more document."
    )


def test_an_alarm_is_one_whether_it_is_acted_on_or_advised() -> None:
    seen = InstabilitySeen(1, "rise", "", "replay", "", "", 1.0)
    advised = ActionWithheld("stability/rise", (), "advise", "")
    other = ActionWithheld("replace", ("n",), "advise", "")
    found = [alarm_of(Entry(1.0, "1.00", 41, event)) for event in (seen, advised, other)]
    assert found == ["rise", "rise", ""]
