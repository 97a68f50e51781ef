"""The fused layer compiles for sm_90 to what the kernel was written for; `make sass` looks at other GPUs, too."""

import json
from importlib.metadata import version

import pytest

from benchmarks.machine_code.layers import FORMS, complaints
from tests.kernels.compiling import ROOT, output_of


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return output_of("benchmarks.machine_code.layers", tmp_path_factory.mktemp("triton"), "--json")["rows"]


def test_nothing_is_wrong_with_any_form(report):
    assert {row["form"] for row in report} == set(FORMS)
    assert complaints(report) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stack": 8}, "spills"),
        ({"integer_divisions": 1}, "divides integers"),
        ({"shared_bytes": 300_000}, "takes 300000 bytes"),
        ({"tensor_core_instructions": 0}, "without tensor cores"),
    ],
)
def test_what_is_wrong_is_said(report, change, said):
    assert said in complaints([{**report[0], **change}])[0]


def test_the_committed_table_is_that_of_this_code(report):
    committed = json.loads((ROOT / "benchmarks" / "results" / "layers_code.json").read_text())
    if committed["environment"]["triton"] != version("triton"):
        pytest.skip(f"the table was made with Triton {committed['environment']['triton']}")
    assert [row for row in committed["rows"] if row["target"] == "sm_90"] == report
