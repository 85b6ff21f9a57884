"""Options from an untrusted file."""

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from questpress.pipeline.api.options import read_options
from questpress.pipeline.config.limits import parse_yaml
from questpress.pipeline.errors import UsageError

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@settings(max_examples=50, deadline=None)
@given(PLAIN)
def test_written_yaml_is_read_back(content):
    text = yaml.safe_dump(content, allow_unicode=True)
    assert parse_yaml(text) == yaml.safe_load(text)


def test_alias_stands_for_its_anchor():
    assert parse_yaml("a: &x [1, 2]\nb: *x\n") == {"a": [1, 2], "b": [1, 2]}


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(8)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "values with aliases expanded"),
        ("a: &a [*a]", "contains itself"),
        ("[" * 50 + "]" * 50, "nested more than 20 deep"),
        ("[" * 100_000, "nested more than 20 deep"),
        ("x: " + "a" * 1_100_000, "characters"),
        ("x: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("x: [1", "expected"),
        ("x: 2001-99-99", "an invalid value"),
        ("x: " + "9" * 5000, "an invalid value"),
        ("x: !!binary '\u00e9'", "base64|ASCII|ascii"),
        ("x: !!int 'a'", "an invalid value"),
        ("? [a, b]\n: c", "unhashable"),
        ("a: &a {x: 1}\nb: {<<: [" + ", ".join(["*a"] * 20_000) + "]}", "values with aliases expanded"),
        ("x: \x1b", "special characters are not allowed"),
    ],
)
def test_hostile_yaml_is_refused(text, message, tmp_path):
    with pytest.raises(yaml.YAMLError, match=message):
        parse_yaml(text)
    file = tmp_path / "options.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=r"--config .*options\.yaml is not valid YAML") as refused:
        read_options({"config": str(file)})
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 600
