"""Small models on synthetic tasks of recall, memory and state, learned from endless or fixed examples.

    python train.py --config=configs/synthetic.py:palindrome,kda
    python train.py --config=configs/synthetic.py:S3,"deltanet full" --config.mixers.deltanet.neg_eigval=true

The argument is TASK,PATTERN; kda if the pattern is left out, repeated to the task's depth. Tasks:

    palindrome, copy, stack    Kimi Linear, section 5.1: 2 layers of 2 heads of 128; here length 256, 512 ids
    joint_recall               HAX: 8 keys in each of 8 contexts, 274 tokens
    induction                  H3: 30 tokens of 20
    in_context_recall, noisy_in_context_recall, fuzzy_in_context_recall, memorization, selective_copying
                               MAD: mixer, SwiGLU, mixer, SwiGLU of width 128, 200 epochs of batch 128
    parity, S3, S4, A5, S5     DeltaProduct's word problems: one layer, length 128
    counting                   64 tokens of 32 ids
    phonebook                  books of 4 to 16 names, in bytes
    latent_recall              4 to 16 pairs of 63 concepts
    regression                 a linear map of 6 features, 128 pairs
    listops, pathfinder        Long Range Arena's, causal, the class read at the end; 2000 and 1025 tokens

MQAR has a file of its own, mqar.py. Accuracy on held-out examples is `val_accuracy` in metrics.jsonl. The
papers sweep learning rates (Kimi Linear 5e-5 to 1e-3, MAD 1e-4 to 1e-3); here it is 1e-3.
"""

from ml_collections import ConfigDict

from hybridlm.config import data, load
from hybridlm.data import copying, joint_recall, latent_recall, mad, pathfinder, phonebook, state_tracking
from hybridlm.errors import ConfigError, nearest

MAD_VOCAB = {"noisy_in_context_recall": 32, "memorization": 256}
MAD_LENGTH = {"memorization": 32, "selective_copying": 256}
SIZED = {"phonebook": ("entries", (4, 8, 16)), "latent_recall": ("pairs", (4, 8, 16))}
# task -> ids, tokens of a row
TASKS = {
    **dict.fromkeys(copying.TASKS, (512, 256)),
    "induction": (20, 30),
    "stack": (512, 256),
    "joint_recall": (64, joint_recall.length(8, 8)),
    **{task: (MAD_VOCAB.get(task, 16), MAD_LENGTH.get(task, 128)) for task in mad.TASKS},
    **dict.fromkeys(state_tracking.GROUPS, (128, 128)),
    "counting": (128, 65),
    "phonebook": (256, phonebook.length(16)),
    "latent_recall": (256, latent_recall.length(16)),
    "regression": (128, 256),
    "listops": (32, 2000),
    "pathfinder": (pathfinder.VOCABULARY, pathfinder.length(32)),
}


def get_config(arg: str = "palindrome,kda") -> ConfigDict:
    task, _, pattern = arg.partition(",")
    if task not in TASKS:
        allowed = "must be TASK or TASK,PATTERN with TASK one of " + ", ".join(TASKS)
        raise ConfigError("--config", f"synthetic.py:{arg}", allowed, nearest(task, TASKS))
    config = load("configs/mqar.py:" + (pattern or "kda"))
    config.data, (config.model.vocab_size, config.train.seq_len) = _data(task), TASKS[task]
    config.model.tie_embeddings = False
    config.train.batch_size = 128
    if task in mad.TASKS:
        config.train.steps = 200 * config.data.train_examples // 128
        config.model.mlp_hidden = 256
    if task in state_tracking.GROUPS:
        config.model.num_layers = 1
        config.optimizer.weight_decay = 1e-6
    return config


def _data(task: str) -> ConfigDict:
    """Those of `SIZED` are mixtures of sizes, of which the easy ones teach."""
    if task in copying.TASKS:
        return data("copying", task=task)
    if task in mad.TASKS:
        return data("mad", task=task, train_examples=256 if task == "memorization" else 12_800)
    if task in state_tracking.GROUPS:
        return data("state_tracking", group=task)
    if task not in SIZED:
        return data(task)
    field, sizes = SIZED[task]
    return data("mixture", components={f"{field}_{n}": data(task, **{field: n}) for n in sizes})
