"""docs/reliability.md lists all promises in order, and every test that it names exists."""

import re

from conftest import ROOT

TABLE = (ROOT / "docs/reliability.md").read_text()


def rows() -> list[tuple[str, str]]:
    """The number of every promise, and the rest of its row."""
    return re.findall(r"^\| (r\d\d) \|(.*)\|$", TABLE, re.M)


def test_all_promises_are_listed_with_tests_that_exist():
    numbers = [number for number, _ in rows()]
    assert numbers == [f"r{i:02d}" for i in range(1, len(numbers) + 1)]
    assert len(numbers) >= 92
    for number, row in rows():
        names = re.findall(r"`(test_\w+\.py)`: ((?:`\w+`(?:, )?)+)", row)
        assert names, f"{number} names no test"
        for file, tests in names:
            source = (ROOT / "tests" / file).read_text()
            for test in re.findall(r"`(\w+)`", tests):
                assert f"def {test}(" in source, f"{number}: no {test} in {file}"


def test_every_promise_names_the_public_thread_it_came_from_or_says_that_there_is_none():
    for number, row in rows():
        promise, _, _ = row.partition(" | ")
        threads = re.findall(r"\[([\w.-]+)#(\d+)\]\((\S+?)\)", promise)
        assert bool(threads) != ("found by reading" in promise), number
        for repository, thread, link in threads:
            pattern = rf"https://github\.com/[\w.-]+/{repository}/(issues|pull)/{thread}"
            assert re.fullmatch(pattern, link), f"{number}: {link}"
