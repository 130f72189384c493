"""Every claim about released code has a source. The table below holds what was read in the four
repositories, file by file. Pages and help texts that say "released" name repository, commit and
file, and no file or function that the table does not have."""

import ast
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPTS

from studies import released


@dataclass
class Repository:
    """A commit, and the files in it that were read, each with functions and classes that it has."""

    commit: str
    files: dict[str, str]


ADPA_RECIPES = "recipes/llama3.2-1b-deita-dpomix"
RM_TRAINERS = "RewardTrainer/train/reward_models"
READ = {
    "gaoshiping/ADPA": Repository(
        commit="a95c32f3bd55cad345ef49ce15be4468e993d22e",
        files={
            "README.md": "",
            "recipes/accelerate_config/deepspeed_zero3.yaml": "",
            f"{ADPA_RECIPES}/student_adpa.yaml": "",
            f"{ADPA_RECIPES}/student_dckd.yaml": "",
            f"{ADPA_RECIPES}/teacher_dpo.yaml": "",
            "scripts/run_distill_dpo.py": "tokenize_row concatenated_forward get_kl_loss",
            "utils/compress_logits.py": "load_input_and_target_probs_fast",
            "utils/merge_logits_adpa_dataset.py": "get_margin_logp_token",
            "utils/precompute_logits.py": "compress_probs encode_prompt LogitsExtractor",
            "utils/vllm_generate.py": "",
        },
    ),
    "EganGu/PAD": Repository(
        commit="89f2a9104ebfdab1b821f2d86240d422b7ec5393",
        files={
            "README.md": "",
            "data_gen/gen/agg.py": "get_most_different_texts",
            "data_gen/gen/mcq-template.json": "",
            "data_gen/gen/prob.py": "main stat_prob truncate_and_add_ellipsis",
            "data_gen/gen/utlis.py": "get_template",
            "data_gen/scripts/pipeline_n4_gemma.sh": "",
            "data_gen/scripts/sampling.sh": "",
            "gemma-log/pad.log": "",
            "scripts/run_pad.py": "filter",
            "scripts/simpo_trainer.py": (
                "get_batch_loss_metrics jenson_shannon_divergence pd_loss plackett_luce_logprob"
            ),
            "training_configs/gemma-2-2b-it-pd.yaml": "",
        },
    ),
    "microsoft/LMOps": Repository(
        commit="4f2a9deb5f08e459fd44c2e4792344d78ca89fc3",
        files={
            "dpkd/arguments.py": "",
            "dpkd/evaluate.py": "",
            "dpkd/main.py": "finetune get_distil_loss get_learning_rate_scheduler get_lmpt_loss",
            "dpkd/scripts/dpkd-gpt2_base_runner.sh": "",
            "minillm/scripts/gpt2/tools/process_pseudo_data_seqkd.sh": "",
        },
    ),
    "Joe-Hall-Lee/RM-Distiller": Repository(
        commit="0436fb04041c6ff009f63d4ed65ad3322175fcb9",
        files={
            "README.md": "",
            "RewardTrainer/scripts/train_distilrm.sh": "",
            f"{RM_TRAINERS}/distilrm_reward_trainer.py": "JointRewardTrainer.compute_loss",
            f"{RM_TRAINERS}/grm_utils.py": "ValueHead",
            f"{RM_TRAINERS}/load_distilrm_datasets.py": (
                "build_joint_dataset load_joint_train_eval_dataset"
            ),
            f"{RM_TRAINERS}/reward_trainer.py": "RewardTrainer.compute_loss",
            f"{RM_TRAINERS}/run_distilrm_reward_train.py": "",
            "refine/generate_response_vllm.py": "",
            "refine/refine_rejected_vllm.py": "",
            "refine/refine_response_api.py": "",
            "refine/refine_response_vllm.py": "",
            "score/cali_score_api.py": "extract_score load_original_and_bridge",
            "score/cali_score_vllm.py": "",
            "score/score_orig_vllm.py": "extract_scores",
            "score/score_vllm.py": "sample_two_responses",
        },
    ),
}
REPOSITORY = {
    "adpa": "gaoshiping/ADPA",
    "dckd": "gaoshiping/ADPA",
    "dpkd": "microsoft/LMOps",
    "pad": "EganGu/PAD",
    "rm_distiller": "Joe-Hall-Lee/RM-Distiller",
}
PAGES = [
    ROOT / "README.md",
    ROOT / "playground" / "README.md",
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
NO_SOURCE = r"\b(paper's|authors'|[Ii]ts|[Tt]heir) code\b"
SAYS_RELEASED = rf"\b([Rr]eleased?)\b|{NO_SOURCE}"
# A path between backticks, as far as it stands in a folder: `dpkd/main.py`.
PATH = r"`([\w.-]+/[\w./-]+\.(?:py|sh|yaml|json|log|md))`"


def repositories_of(page: Path) -> list[str]:
    """The repositories that a page links at the commit that was read."""
    linked = re.findall(r"https://github\.com/([\w-]+/[\w.-]+)/tree/(\w+)", page.read_text())
    return [name for name, commit in linked if name in READ and READ[name].commit == commit]


def without_own_module(text: str) -> str:
    """The text without the name of studies/released.py."""
    return re.sub(r"studies[./]released(\.py)?", "", text)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_a_page_about_released_code_links_repository_and_commit(page):
    if re.search(SAYS_RELEASED, without_own_module(page.read_text())):
        assert repositories_of(page), f"{page.name} links no commit that was read"


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_to_code_on_github_lead_to_what_was_read(page):
    links = re.findall(r"https://github\.com/([^)\s]+/(?:tree|blob)/[^)\s]+)", page.read_text())
    for link in links:
        owner, name, _, commit, *path = link.partition("#")[0].split("/")
        read = READ[f"{owner}/{name}"]
        assert commit == read.commit, link
        path = "/".join(path)
        known = [file for file in read.files if file == path or file.startswith(f"{path}/")]
        assert known or not path, link


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_files_on_a_page_are_this_projects_or_were_read(page):
    known = set()
    for name in repositories_of(page):
        known |= set(READ[name].files)
    for path in re.findall(PATH, page.read_text()):
        is_own = (ROOT / path).exists() or path.startswith("runs/")
        assert is_own or path in known, f"{page.name} names {path}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_point_about_released_code_names_a_file_and_no_unknown_function(script):
    page = (ROOT / "docs" / f"{script}.md").read_text()
    files = READ[REPOSITORY[script]].files
    section = page.split("## Paper · released code · here")[1].split("\n#")[0]
    points = re.split(r"^(?=\d+\. )", section, flags=re.M)[1:]
    about_released = [point for point in points if "Released" in point]
    assert len(about_released) >= 5
    for point in about_released:
        named = [path for path in re.findall(r"`([^`]+)`", point) if path in files]
        assert named, point
        functions = " ".join(files[path] for path in named).split()
        claims = re.findall(r"`([\w.]+)` (?:in|of) `([^`]+)`", point)
        claims += [(name, path) for path, name in re.findall(r"`([^`]+)`,\s+`([\w.]+)`", point)]
        for name, path in claims:
            if path in files:
                assert name in functions, f"{name} in {path}"


def strings_of(script: Path) -> list[str]:
    """The docstring and all help texts of a script, each in one line."""
    strings = []
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            strings.append(" ".join(node.value.split()))
    return strings


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_about_released_code_names_a_file(script):
    repository = READ[REPOSITORY[script]]
    names = {Path(path).name for path in repository.files}
    docstring, *helps = strings_of(ROOT / f"{script}.py")
    assert f"({REPOSITORY[script]}, commit {repository.commit[:7]}" in docstring
    about_released = [text for text in helps if "released" in text]
    assert len(about_released) >= 4
    for text in about_released:
        for word in re.findall(r"released (\S+)", text):
            assert word.rstrip(":,") in names, text
    comments = " ".join(re.findall(r"^ *# (.*)", (ROOT / f"{script}.py").read_text(), re.M))
    for word in re.findall(r"released (\S+)", comments):
        assert word.rstrip(":,") in names, word
    assert not re.search(NO_SOURCE, docstring + comments + " ".join(helps))


def test_every_formula_of_studies_released_names_its_source():
    for name_of_variant, variant in released.VARIANTS.items():
        text = " ".join(variant.replacement.__doc__.split())
        repository = REPOSITORY[name_of_variant]
        source = re.search(r"Source: (\S+) (\w+), (\S+) `([\w.]+)`", text)
        assert source, text
        name, commit, path, function = source.groups()
        assert name == repository and READ[name].commit.startswith(commit)
        assert function in READ[name].files[path].split()
