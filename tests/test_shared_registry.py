"""Choices by name: what is joined, what is loaded when, and the one line for each thing that can be wrong."""

import re
import sys
from collections.abc import Callable

import pytest
from pydantic import TypeAdapter

from client.personal.personalize import PERSONAL_METHODS
from shared import config, registry
from shared.config import PersonalConfig
from shared.datasets import READERS
from shared.errors import ScenarioError
from shared.heads.lora import FEDERATION_METHODS, PARTS, TECHNIQUES, FederationMethod

OWN = {"plain": len}


def refused(name, kind="readers", built_in=OWN, form=Callable):
    with pytest.raises(ScenarioError) as caught:
        registry.lookup(kind, name, built_in, form)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_names_are_the_built_in_ones_then_the_installed_ones(install_package):
    install_package("ext_a", "", {"readers": {"zebra": "x", "ant": "x"}, "metrics": {"other": "x"}})
    assert registry.names("readers", OWN) == ("plain", "ant", "zebra")


def test_only_what_is_asked_for_is_imported(install_package):
    install_package("ext_a", "def read(folder): return folder", {"readers": {"one": "read"}})
    install_package("ext_b", "raise RuntimeError('broken')", {"readers": {"two": "read"}})
    registry.names("readers", OWN)
    registry.check_name("readers", "one", OWN)
    assert registry.origin("readers", "one", OWN) == "ext_a 1.2"
    assert "ext_a" not in sys.modules
    assert registry.lookup("readers", "one", OWN, Callable)(3) == 3
    assert registry.lookup("readers", "plain", OWN, Callable) is len
    assert registry.origin("readers", "plain", OWN) == "built-in"


def test_an_unknown_name_lists_built_in_and_installed(install_package):
    install_package("ext_a", "", {"readers": {"one": "read"}})
    assert refused("two") == "data format must be 'plain' or 'one', got 'two'."
    assert "must be 'plain', got 'one'" in refused("one", kind="metrics")


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import nowhere_at_all", "cannot be imported from ext_a:read: ModuleNotFoundError: No module named 'nowhere"),
        ("x = 1", "cannot be imported from ext_a:read: AttributeError"),
        ("def read(:", "cannot be imported from ext_a:read: SyntaxError"),
        ("raise ValueError('two\\nlines')", "cannot be imported from ext_a:read: ValueError: two. Mend"),
        ("read = 3", "must be a Callable, got int"),
    ],
)
def test_what_is_broken_is_said_in_one_line_with_the_package(install_package, code, says):
    install_package("ext_a", code, {"readers": {"one": "read"}})
    message = refused("one")
    assert message.startswith("data format 'one' of ext_a 1.2 ")
    assert says in message


def test_an_object_of_another_form_is_refused(install_package):
    install_package("ext_a", "parts = ('output',)", {"federation_methods": {"mine": "parts"}})
    assert "must be a FederationMethod, got tuple" in refused("mine", "federation_methods", {}, FederationMethod)


def test_a_name_that_is_built_in_may_not_be_registered(install_package):
    install_package("ext_a", "", {"readers": {"plain": "read"}})
    assert refused("plain") == (
        "data format 'plain' is built in, and ext_a 1.2 registers it too; uninstall that package."
    )
    with pytest.raises(ScenarioError, match="built in"):
        registry.origin("readers", "plain", OWN)


def test_two_packages_may_not_register_one_name(install_package):
    install_package("ext_a", "", {"readers": {"one": "read"}})
    install_package("ext_b", "", {"readers": {"one": "read"}}, version="3")
    message = refused("one")
    assert "must be registered once" in message
    assert "ext_a 1.2" in message
    assert "ext_b 3" in message


def test_a_scenario_takes_an_installed_name_and_refuses_an_unknown_one(install_package):
    with pytest.raises(ValueError, match=r"personal\.method must be 'none', .* or 'retrieval', got 'mine'\."):
        PersonalConfig(method="mine")
    install_package("ext_a", "raise RuntimeError", {"personal_methods": {"mine": "x"}})
    assert PersonalConfig(method="mine").method == "mine"  # a scenario is read without importing anything
    with pytest.raises(ValueError, match=r"must be 'none', .* 'retrieval' or 'mine', got 'yours'"):
        PersonalConfig(method="yours")


def choices(annotation):
    """The names a setting's check calls its own, found by the message it gives."""
    with pytest.raises(ValueError, match="must be") as caught:
        TypeAdapter(annotation).validate_python("?")
    return set(re.findall(r"'([\w-]+)'", str(caught.value).split(", got")[0]))


@pytest.mark.parametrize(
    ("annotation", "registered"),
    [
        (config.FederationMethodName, FEDERATION_METHODS),
        (config.PersonalMethodName, PERSONAL_METHODS),
        (config.TechniqueName, TECHNIQUES),
        (config.FormatName, READERS),
    ],
)
def test_the_names_a_scenario_may_give_are_those_of_the_dicts(annotation, registered):
    assert choices(annotation) == set(registered)


def test_the_policy_and_the_methods_agree_on_what_the_shared_step_reads():
    sequential = {name for name, method in PERSONAL_METHODS.items() if method.read_by_shared_step is False}
    assert sequential == set(config.PERSONAL_NAMES)


@pytest.mark.parametrize("parts", [(), ("lora_A", "embedding")])
def test_a_federation_method_trains_known_parts(parts):
    with pytest.raises(ScenarioError, match="must be some of"):
        FederationMethod(parts, "wrong")
    assert FederationMethod(PARTS, "right").parts == PARTS


def test_a_description_is_one_line():
    assert registry.describe(FEDERATION_METHODS["fedavg"]).startswith("FedIT")
    assert registry.describe(READERS["movielens-100k"]).startswith("Read MovieLens 100k")
    assert registry.describe(object.__new__(type("Bare", (), {}))) == ""
