import pytest

from headwater.core.errors import MethodError
from headwater.trace.config import OF_HISTORY, STAGES, with_needs
from headwater.trace.investigation import Investigation


def test_yaml_and_python_give_the_same_investigation(tmp_path):
    file = tmp_path / "ioi.yaml"
    file.write_text(
        "behavior: ioi\nmodel: smollm2\nout: runs/ioi\nseed: 3\n"
        "localize: {steps: 7}\ncircuit:\n  fractions: [0.1, 1.0]\nstages: [behavior]\n"
    )
    same = Investigation(
        behavior="ioi", model="smollm2", out="runs/ioi", seed=3, localize={"steps": 7},
        circuit={"fractions": (0.1, 1.0)}, stages=("behavior",),
    )  # fmt: skip
    assert Investigation.from_yaml(file) == same
    assert Investigation.from_yaml(file, seed=4).seed == 4
    assert "out" not in same.stored() and "stages" not in same.stored() and same.stored()["localize"]["steps"] == 7


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"behaviour": "ioi"}, "behavior"),
        ({"localize": {"step": 3}}, "steps"),
        ({"claims": {"Q": 0.1}}, "q"),
        ({"localize": {"steps": 0}}, "'localize'.*steps"),
        ({"seed": "often"}, "seed"),
        ({"stages": ["localise"]}, "localize"),
        ({"circuit": {"fraction": 1.5}}, "'circuit'.*fraction"),
        ({"timeline": {"checkpoint": 3}}, "checkpoints"),
        ({"do_data": {"how": "somehow"}}, "how"),
    ],
)
def test_unknown_keys_and_wrong_values_are_refused_with_near_names(settings, message):
    with pytest.raises(MethodError, match=message):
        Investigation(**{"behavior": "ioi", "model": "m", **settings})


def test_a_missing_setting_is_named():
    with pytest.raises(MethodError, match="model"):
        Investigation(behavior="ioi")  # type: ignore[call-arg]
    with pytest.raises(MethodError, match="out"):
        Investigation(behavior="ioi", model="m").run()


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", "just words"])
def test_what_is_no_mapping_in_yaml_is_refused(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(MethodError):
        Investigation.from_yaml(tmp_path / "x.yaml")
    with pytest.raises(MethodError, match="cannot read"):
        Investigation.from_yaml(tmp_path / "missing.yaml")


def test_settings_are_frozen():
    with pytest.raises(Exception, match="frozen"):
        Investigation(behavior="ioi", model="m").seed = 3  # type: ignore[misc]


def test_stages_bring_what_they_need():
    assert with_needs(("heads",)) == ("behavior", "localize", "heads")
    assert with_needs(("data",)) == ("behavior", "localize", "circuit", "heads", "timeline", "data")
    without = with_needs(("report", "claims"), without=OF_HISTORY)
    assert without == ("behavior", "localize", "circuit", "heads", "claims", "report")
    assert with_needs(STAGES) == STAGES


def test_a_model_without_its_history_has_no_stages_about_it(tmp_path):
    assert not set(Investigation(behavior="ioi", model="m").planned) & set(OF_HISTORY)
    published = Investigation(behavior="ioi", model="m", history="EleutherAI/pythia-70m")
    assert set(published.planned) & set(OF_HISTORY) == {"timeline"}
    known = Investigation(behavior="ioi", model="m", history="EleutherAI/pythia-70m", corpus="pile.jsonl")
    assert set(known.planned) & set(OF_HISTORY) == {"timeline", "data"}
    (tmp_path / "train.json").write_text("{}")
    own = Investigation(behavior="ioi", model=tmp_path)
    assert own.planned == STAGES
    told = Investigation(behavior="ioi", model=tmp_path, do_data={"how": "none"})
    assert "do_data" not in told.planned and told.stored()["do_data"]["how"] == "none"


def test_what_says_nothing_is_not_stored():
    """So a run from before there were such settings is a run of the same config, and can be gone on with."""
    stored = Investigation(behavior="ioi", model="m").stored()
    assert not {"history", "corpus", "corpus_options", "timeline", "data", "do_data"} & set(stored)
    assert Investigation(**stored) == Investigation(behavior="ioi", model="m")
