"""Alert rules in a device's config: errors name the file, the key and the fix."""

from __future__ import annotations

from pathlib import Path

import pytest

from outstation.device import config
from outstation.device.config import alert_rules
from outstation.device.config.alert_rules import Comparison, Confirmation
from outstation.foundation.errors import ConfigError

HEAD = """
[device]
id = "pi-07"
fleet = "acme"

[streams.watch]
fields = [{ name = "ax" }]

[tasks.exercise]
stream = "watch"
bundle = "exercise"

[[tasks.exercise.alerts]]
"""


def load(folder: Path, rule: str) -> config.Config:
    file = folder / "outstation.toml"
    file.write_text(HEAD + rule, encoding="utf-8")
    return config.load(file)


@pytest.mark.parametrize(
    ("rule", "key", "problem"),
    [
        ('label = "a"', "alerts[0].name", "required"),
        ('name = "A rule"\nlabel = "a"', "alerts[0].name", "must be 1-64 of"),
        ('name = "x"', "alerts[0]", "has no condition, so it can never fire"),
        ('name = "x"\nlabel = "a"\nvalue = "> 1"', "alerts[0].value", "this one has label and value"),
        ('name = "x"\nanomaly = true\nscore = "> 0.5"', "alerts[0].anomaly", "score and anomaly"),
        ('name = "x"\nlabel = "a"\nlabels = ["b"]', "alerts[0].labels", "one condition"),
        ('name = "x"\nlabels = ["b", "b"]', "alerts[0].labels", "listed twice"),
        ('name = "x"\nlabels = []', "alerts[0].labels", "at least 1 entry"),
        ('name = "x"\nscore = "0.9"', "alerts[0].score", 'such as ">= 0.9"'),
        ('name = "x"\nvalue = "== 3"', "alerts[0].value", "is no comparison"),
        ('name = "x"\nvalue = "> nan"', "alerts[0].value", "is no comparison"),
        ('name = "x"\nlabel = "a"\nfor = "4 of 3"', "alerts[0].for", "4 is more than 3"),
        ('name = "x"\nlabel = "a"\nfor = "0 of 3"', "alerts[0].for", "at least 1"),
        ('name = "x"\nlabel = "a"\nfor = "1 of 5000"', "alerts[0].for", "from 1 to 1000"),
        ('name = "x"\nlabel = "a"\nfor = "soon"', "alerts[0].for", '"3 of 5" or a duration'),
        ('name = "x"\nlabel = "a"\nfor = "0 s"', "alerts[0].for", "must be positive"),
        ('name = "x"\nlabel = "a"\nfor = "9000 d"', "alerts[0].for", "at most 366 d"),
        ('name = "x"\nlabel = "a"\nhold = "9000 d"', "alerts[0].hold", "at most 366 d"),
        ('name = "x"\nunchanged = "9000 d"', "alerts[0].unchanged", "at most 366 d"),
        ('name = "x"\nunchanged = "1 windows"', "alerts[0].unchanged", "from 2 to 1000 windows"),
        ('name = "x"\nunchanged = "2 h"\nfor = "3 of 5"', "alerts[0].for", "remove `for`"),
        ('name = "x"\nlabel = "a"\nclear = "< 1"', "alerts[0].clear", "so remove it"),
        ('name = "x"\nvalue = "> 80"\nclear = "> 85"', "alerts[0].clear", "begin it with <"),
        ('name = "x"\nvalue = "> 80"\nclear = "< 85"', "alerts[0].clear", "the other side of 80"),
        ('name = "x"\nvalue = "<= 5"\nclear = ">= 5"', "alerts[0].clear", "the other side of 5"),
        ('name = "x"\nvalue = "> 80"\noutput = "a"\nlable = "b"', "alerts[0].lable", "did you mean 'label'?"),
        ('name = "x"\nlabel = "a"\nfr = "3 of 5"', "alerts[0].fr", "did you mean 'for'?"),
        ('name = "x"\nlabel = "a"\nseverity = "high"', "alerts[0].severity", "not a valid choice"),
        ('name = "x"\nlabel = "a"\nsummary = "{lable}"', "alerts[0].summary", "did you mean 'label'?"),
        ('name = "x"\nlabel = "a"\nsummary = "{label.__class__}"', "alerts[0].summary", "unknown placeholder"),
        ('name = "x"\nlabel = "a"\nsummary = "{label:>9999}"', "alerts[0].summary", "takes no format"),
        ('name = "x"\nlabel = "a"\nsummary = "{label!r}"', "alerts[0].summary", "takes no format"),
        ('name = "x"\nlabel = "a"\nsummary = "{}"', "alerts[0].summary", "unknown placeholder"),
        ('name = "x"\nlabel = "a"\nsummary = "{"', "alerts[0].summary", "for braces of the text"),
        (
            'name = "x"\nlabel = "a"\n\n[[tasks.exercise.alerts]]\nname = "x"\nlabel = "b"',
            "alerts[1].name",
            "duplicate",
        ),
    ],
)
def test_an_error_in_a_rule_names_file_key_and_fix(tmp_path: Path, rule: str, key: str, problem: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load(tmp_path, rule)
    assert str(refused.value).startswith(f"{tmp_path}/outstation.toml: tasks.exercise.{key}: ")
    assert problem in str(refused.value)


def test_more_rules_than_the_limit_are_an_error(tmp_path: Path) -> None:
    template = 'name = "x{}"\nlabel = "a"\n\n[[tasks.exercise.alerts]]\n'
    with pytest.raises(ConfigError, match="33 rules, the limit is 32"):
        load(tmp_path, "".join(template.format(i) for i in range(32)) + 'name = "last"\nlabel = "a"')


def test_a_rule_with_every_key_is_read(tmp_path: Path) -> None:
    text = (
        'name = "falls"\nlabels = ["a", "b"]\nscore = ">= 0.9"\nclear = "< 0.5"\nfor = "3 of 5"\nhold = "10 min"\n'
        'severity = "critical"\nsummary = "{device} {task} {label} {score} {value} {time} {{}}"\nonly_healthy = true'
    )
    [rule] = load(tmp_path, text).tasks["exercise"].alerts
    assert rule.confirmation == Confirmation(3, 5)
    assert (rule.hold, rule.class_names, rule.severity, rule.only_healthy) == (600.0, ["a", "b"], "critical", True)


@pytest.mark.parametrize(
    ("text", "confirmation"),
    [
        ("100 windows", Confirmation(99, 99)),
        ("2 h", Confirmation(duration_s=7200.0)),
    ],
)
def test_equal_answers_are_one_more_than_their_repetitions(text: str, confirmation: Confirmation) -> None:
    assert alert_rules.parse_unchanged(text) == confirmation


@pytest.mark.parametrize("sign", [">", ">=", "<", "<="])
@pytest.mark.parametrize("limit", [-1.0, 0.0, 0.5, 1.0, 2.0])
def test_never_and_always_agree_with_the_numbers_of_a_range(sign: str, limit: float) -> None:
    comparison = Comparison(sign, limit)
    numbers = [0.0, 0.25, 0.5, 0.75, 1.0]
    holds = [eval(f"{number} {sign} {limit}") for number in numbers]
    assert comparison.never_holds(0.0, 1.0) == (not any(holds))
    assert comparison.always_holds(0.0, 1.0) == all(holds)


def test_a_missing_key_of_a_rule_does_not_suggest_the_list_that_the_rule_is_in(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"alerts\[0\]\.name: this key is required; add it$"):
        load(tmp_path, 'label = "a"')
