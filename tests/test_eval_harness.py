"""lm-evaluation-harness on a run, with local data: multiple choice, rolling and generative."""

import dataclasses
import json
import logging

import jax
import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="needs the eval extra")

from lm_eval.api.instance import Instance

from eval import harnessed as harness
from eval import subject
from hybridlm import config as configs
from hybridlm import model as lm
from hybridlm.data import tokenizer
from hybridlm.errors import ConfigError
from hybridlm.rows import single_document
from tests import tiny

DOCS = [
    {"text": "the gate and the ", "choices": ["state", "decay of it", "k"], "gold": 1, "answer": "state"},
    {"text": "query, key and ", "choices": ["value", "chunk"], "gold": 0, "answer": "value"},
    {"text": "a head, a ", "choices": ["q", "head key value query"], "gold": 0, "answer": "head"},
]
COMMON = """
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
"""
TASKS = {
    "choice": "output_type: multiple_choice\ndoc_to_text: text\ndoc_to_choice: choices\ndoc_to_target: gold\n"
    "target_delimiter: ''\nmetric_list: [{metric: acc}]\n",
    "rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: text\n"
    "metric_list: [{metric: bits_per_byte}]\n",
    "writing": "output_type: generate_until\ndoc_to_text: text\ndoc_to_target: answer\n"
    "generation_kwargs: {until: [' '], max_gen_toks: 8}\nmetric_list: [{metric: exact_match}]\n",
}


@pytest.fixture(scope="module")
def tested():
    config = configs.resolve(tiny.config("python-stdlib:", train__seq_len=64))
    definition = lm.build(config)
    params = jax.jit(lambda key: lm.init(definition, key))(jax.random.key(0))
    params = jax.tree.map(lambda x: 4 * x if x.ndim > 3 else x, params)
    return subject.Subject(definition, params, tokenizer.load("bytes"), config, 1)


@pytest.fixture(scope="module")
def forward(tested):
    """Log-probabilities of a text's bytes after the separator, by the plain forward pass."""
    run = jax.jit(
        lambda p, t: jax.nn.log_softmax(lm.logits(tested.definition, p, t, single_document(*t.shape)))
    )

    def log_probs(text):
        ids = [256, *text.encode()]
        padded = np.pad(np.array([ids]), ((0, 0), (0, 64 - len(ids))))
        table = np.asarray(run(tested.params, padded))[0]
        return np.array([table[i, ids[i + 1]] for i in range(len(ids) - 1)]), table.argmax(axis=1)

    return log_probs


def test_tasks_on_local_data(tested, forward, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    for name, text in TASKS.items():
        common = COMMON.replace("DATA", str(tmp_path / "docs.jsonl"))
        (tmp_path / f"{name}.yaml").write_text(f"task: hybridlm_{name}\n{common}{text}")
    names = [f"hybridlm_{name}" for name in TASKS]
    results = harness.evaluate(tested, names, include_path=str(tmp_path))["results"]

    scored = lambda doc, choice: forward(doc["text"] + choice)[0][len(doc["text"]) :].sum()
    best = [int(np.argmax([scored(doc, choice) for choice in doc["choices"]])) for doc in DOCS]
    right = np.mean([guess == doc["gold"] for guess, doc in zip(best, DOCS, strict=True)])
    assert results["hybridlm_choice"]["acc,none"] == pytest.approx(right)
    nats = sum(forward(doc["text"])[0].sum() for doc in DOCS)
    size = sum(len(doc["text"]) for doc in DOCS)
    assert results["hybridlm_rolling"]["bits_per_byte,none"] == pytest.approx(
        -nats / size / np.log(2), rel=1e-5
    )
    assert 0 <= results["hybridlm_writing"]["exact_match,none"] <= 1
    with pytest.raises(ConfigError, match="knows no such task"):
        harness.evaluate(tested, ["hybridlm_chioce"], include_path=str(tmp_path))


def request(kind, *args):
    return Instance(request_type=kind, doc={}, arguments=args, idx=0)


def test_requests(tested, forward):
    model = harness.HybridLM(tested)
    (value, greedy), (empty, _) = model.loglikelihood(
        [request("loglikelihood", "a key", " value"), request("loglikelihood", "", "abc")], disable_tqdm=True
    )
    assert value == pytest.approx(forward("a key value")[0][5:].sum(), rel=1e-5) and not greedy
    assert empty == pytest.approx(forward("abc")[0].sum(), rel=1e-5)

    text = forward("state ")[1][6:7].tolist()  # the most probable token after it
    written = model.generate_until(
        [
            request("generate_until", "state ", {"until": [], "max_gen_toks": 1}),
            request("generate_until", "state ", {"until": ["~~"], "max_gen_toks": 3}),
        ]
    )
    assert written[0] == tested.text_tokenizer.decode(text) and written[1].startswith(written[0])


def test_long_texts_go_in_windows(tested, caplog):
    """A text longer than max_length: each token once, each window's first after the last token before it."""
    model, text = harness.HybridLM(tested, max_length=16), "gate state decay chunk head value key query"
    (total,) = model.loglikelihood_rolling([request("loglikelihood_rolling", text)])
    ids, pairs = list(text.encode()), []
    for start in range(0, len(ids), 16):
        part = ids[start : start + 16]
        context = [256] if start == 0 else ids[:start][-(17 - len(part)) :]
        pairs.append((context, part))
    assert sum(len(part) for _, part in pairs) == len(ids)
    assert total == pytest.approx(sum(value for value, _ in tested.log_likelihoods(pairs)), rel=1e-5)
    assert not caplog.records
    long = model.loglikelihood([request("loglikelihood", text, " key")], disable_tqdm=True)
    assert "1 of 1 prompts are cut at their beginning: 16 tokens are there" in caplog.text
    short = tested.log_likelihoods([(ids[-13:], list(b" key"))])
    assert long[0][0] == pytest.approx(short[0][0], rel=1e-5)  # 16 inputs, 4 of which predict


def writes(model, texts, **settings):
    return model.generate_until(
        [request("generate_until", text, {"until": [], **settings}) for text in texts]
    )


def test_what_leaves_no_room_for_the_prompt(tested, caplog):
    """Cut at the beginning as the harness does, said once; refused where nothing is left."""
    model, text = harness.HybridLM(tested, max_length=16), "the gate, the state"
    with caplog.at_level(logging.WARNING):
        short = writes(model, [text, text[-6:]], max_gen_toks=10)
        writes(model, [text], max_gen_toks=10)
    assert short[0] == short[1]  # the last six tokens are all that is seen
    assert [record.getMessage().startswith("2 of 2 prompts are cut") for record in caplog.records] == [True]
    with pytest.raises(ConfigError, match="max_gen_toks = 16: must be less than the 16 tokens"):
        writes(model, [text], max_gen_toks=16)


def test_an_empty_stop_string_stops_nothing(tested):
    model = harness.HybridLM(tested)
    assert writes(model, ["state "], until=[""], max_gen_toks=4) == writes(model, ["state "], max_gen_toks=4)
    assert writes(model, ["state "], until=["", "~"], max_gen_toks=4)[0]


def test_sampled_repeats_differ_and_do_not_depend_on_batches(tested):
    settings = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 8}
    few = harness.HybridLM(dataclasses.replace(tested, batch_tokens=3 * 72))
    texts = ["the gate "] * 16 + ["a key "]
    written = writes(few, texts, **settings)
    assert len(set(written[:16])) == 16
    assert writes(harness.HybridLM(tested), texts, **settings) == written  # one batch
    assert writes(few, texts[::-1], **settings)[0] == written[16]  # nor on what else is asked
