from gossamer.core.memory import give_back


def test_giving_back_may_be_asked_for_at_any_time() -> None:
    give_back()
    kept = list(range(1000))
    give_back()
    assert kept == list(range(1000))
