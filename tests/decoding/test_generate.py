"""Generation equals re-running the causal forward pass.

Legend: B batch, L positions, N new tokens, V vocabulary.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import modjax
from modjax.decoding.generate import Sampling, extend, generate, resume
from modjax.errors import InputError
from modjax.nn import Routed, Transformer, unstack
from modjax.specs import Dense, MoD, ModelSpec, Predictor
from tests.nn.small import QUICK, key_values, random_model

pytestmark = pytest.mark.usefixtures("quick_compiles")
ROUTED = ModelSpec(
    24, 16, 2, 2, 1, 32, layers=(Dense(), MoD(Dense(), capacity=0.5, causal=Predictor()))
)
MODELS = {
    "predictor": ROUTED,
    "paced": ROUTED,
    "threshold": ROUTED,
    "causal": dataclasses.replace(ROUTED, layers=(Dense(),)),  # dense: it selects nothing
}
PROMPTS_BL = np.array([[3, 9, 4, 17], [5, 0, 0, 0], [11, 2, 6, 0]], np.int32)
LENGTHS_B = np.array([4, 1, 3], np.int32)
NEW, MAX_LENGTH = 8, 12
# With these parameters tokens go both ways through the block, by every routing.
model_of = functools.partial(random_model, seed=9)
GREEDY, DRAWN = Sampling(temperature=0), Sampling(temperature=1.5, top_k=20, top_p=0.95)


def run(routing, **options):
    arguments = {"lengths_B": LENGTHS_B, "max_new_tokens": NEW, "max_length": MAX_LENGTH} | options
    return generate(*model_of(MODELS[routing]), PROMPTS_BL, routing=routing, **arguments)


@functools.cache
def forward(routing):
    """Returns a function (tokens_BL, lengths_B) -> (logits_BLV, depth_BL) of whole sequences."""
    graphdef, params = model_of(MODELS[routing])

    @functools.partial(jax.jit, compiler_options=QUICK)
    def forward(params, tokens_BL, lengths_B):
        valid_BL = jnp.arange(MAX_LENGTH)[None] < lengths_B[:, None]
        model = nnx.merge(graphdef, params)
        logits_BLV, records = model(tokens_BL, valid_BL.astype(jnp.int32), routing=routing)
        selected = [r.selected_BL for r in records.values() if isinstance(r, Routed)]
        depth_BL = sum((jnp.sum(x, axis=0) for x in selected), jnp.zeros(tokens_BL.shape, int))
        return logits_BLV, depth_BL

    return functools.partial(forward, params)


def grow(routing, tokens_BL, lengths_B, new):
    """Writes `new` greedy tokens after the first lengths_B of each row."""
    rows = np.arange(len(tokens_BL))
    for n in range(new):
        logits_BLV, _ = forward(routing)(tokens_BL, lengths_B + n)
        tokens_BL[rows, lengths_B + n] = np.argmax(logits_BLV[rows, lengths_B + n - 1], axis=1)


@functools.cache
def naive(routing):
    """Returns greedy tokens and the depth of every position, from full forward passes."""
    tokens_BL = np.zeros((3, MAX_LENGTH), np.int32)
    tokens_BL[:, :4] = PROMPTS_BL
    grow(routing, tokens_BL, LENGTHS_B, NEW)
    _, depth_BL = forward(routing)(tokens_BL, LENGTHS_B + NEW)
    return tokens_BL, np.asarray(depth_BL)


@functools.cache
def greedy(routing):
    return run(routing, sampling=GREEDY)


@pytest.mark.parametrize("routing", MODELS)
def test_greedy_generation_equals_full_forward_passes_of_a_growing_sequence(routing):
    tokens_BL, depth_BL = naive(routing)
    found = greedy(routing)
    for b, length in enumerate(LENGTHS_B):
        new = slice(length, length + NEW)
        np.testing.assert_array_equal(found.tokens_BO[b], tokens_BL[b, new])
        np.testing.assert_array_equal(found.depths_BO[b], depth_BL[b, new])
        np.testing.assert_array_equal(found.prompt_depths_BL[b, :length], depth_BL[b, :length])
    if routing != "causal":
        assert {0, 1} == set(np.asarray(found.depths_BO).ravel()), "both ways through the block"


def test_a_stop_sequence_ends_its_row_and_no_other():
    tokens_BL, depth_BL = naive("predictor")
    full_BN = np.stack([row[n : n + NEW] for row, n in zip(tokens_BL, LENGTHS_B, strict=True)])
    pairs = [tuple(full_BN[0, n - 2 : n].tolist()) for n in range(2, NEW)]
    end = next(n for n in range(3, NEW) if pairs.index(pairs[n - 2]) == n - 2)  # comes first there
    pair, other = pairs[end - 2], (int(full_BN[2, 5]), 23, 23)
    found = run("predictor", sampling=GREEDY, stop=(pair, other))
    ends = []
    for b, row in enumerate(full_BN):
        ends.append(next((n for n in range(2, NEW + 1) if tuple(row[n - 2 : n]) == pair), NEW))
        np.testing.assert_array_equal(found.tokens_BO[b, : ends[b]], row[: ends[b]])
        np.testing.assert_array_equal(found.tokens_BO[b, ends[b] :], 0)
        depth_N = depth_BL[b, LENGTHS_B[b] :]
        np.testing.assert_array_equal(found.depths_BO[b, : ends[b]], depth_N[: ends[b]])
        np.testing.assert_array_equal(found.depths_BO[b, ends[b] :], -1)
    assert ends[0] == end and max(ends) == NEW
    np.testing.assert_array_equal(found.state.done_B, np.array(ends) < NEW)
    np.testing.assert_array_equal(found.state.cache.positions_B, LENGTHS_B + ends)


@functools.cache
def drawn():
    return run("predictor", sampling=DRAWN, seed=1)


def test_resuming_equals_not_stopping_to_the_bit_also_from_the_disk(tmp_path):
    model = model_of(ROUTED)
    whole = drawn()
    first = run("predictor", sampling=DRAWN, seed=1, max_new_tokens=NEW // 2)
    arrays, structure = jax.tree.flatten(first.state)
    is_key = [jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in arrays]
    raw = [jax.random.key_data(x) if key else x for x, key in zip(arrays, is_key, strict=True)]
    np.savez(tmp_path / "state.npz", *map(np.asarray, raw))

    with np.load(tmp_path / "state.npz") as file:
        raw = [jnp.asarray(file[name]) for name in file.files]
    arrays = [jax.random.wrap_key_data(x) if k else x for x, k in zip(raw, is_key, strict=True)]
    states = {"kept": first.state, "loaded": jax.tree.unflatten(structure, arrays)}
    for name, state in states.items():
        second = resume(*model, state, max_new_tokens=NEW // 2, sampling=DRAWN)
        assert second.prompt_depths_BL is None
        for field in ("tokens_BO", "depths_BO"):
            parts = [getattr(first, field), getattr(second, field)]
            np.testing.assert_array_equal(
                np.concatenate(parts, axis=1), getattr(whole, field), err_msg=name
            )
        np.testing.assert_array_equal(second.state.logits_BV, whole.state.logits_BV)
        caches = [key_values(each.state.cache) for each in (second, whole)]
        assert len(caches[0]) == 2
        for ours, theirs in zip(*caches, strict=True):
            np.testing.assert_array_equal(ours.k_BGWH, theirs.k_BGWH)


def test_a_model_with_its_layers_apart_draws_the_same_and_copies_no_weights():
    config = dataclasses.replace(ROUTED, num_layers=4)
    model = model_of(config)
    apart = unstack(*model)
    options = {"max_new_tokens": NEW, "max_length": MAX_LENGTH, "routing": "predictor"}
    found = [generate(*m, PROMPTS_BL[:1], sampling=GREEDY, **options) for m in (model, apart)]
    for field in ("tokens_BO", "depths_BO", "prompt_depths_BL"):
        np.testing.assert_array_equal(*(getattr(x, field) for x in found))
    np.testing.assert_array_equal(*(x.state.logits_BV for x in found))
    reader = {"max_length": MAX_LENGTH, "routing": "predictor"}
    splits = [
        str(jax.make_jaxpr(lambda p, m=m: nnx.merge(m, p).reader(**reader) and 0)(p))
        for m, p in (model, apart)
    ]
    assert "split" in splits[0] and "split" not in splits[1]


def test_a_seed_fixes_the_text_and_another_gives_another():
    tokens = [np.asarray(run("predictor", sampling=DRAWN, seed=s).tokens_BO) for s in (1, 2)]
    np.testing.assert_array_equal(tokens[0], drawn().tokens_BO)
    assert np.mean(tokens[0] != tokens[1]) > 0.5


def test_no_new_tokens_reads_the_prompt_and_resume_draws():
    nothing = run("predictor", sampling=DRAWN, seed=1, max_new_tokens=0)
    assert nothing.tokens_BO.shape == (3, 0)
    then = resume(*model_of(ROUTED), nothing.state, max_new_tokens=NEW, sampling=DRAWN)
    np.testing.assert_array_equal(then.tokens_BO, drawn().tokens_BO)


@pytest.mark.parametrize("routing", MODELS)
def test_a_second_turn_equals_full_forward_passes_of_the_whole_conversation(routing):
    model, rows = model_of(MODELS[routing]), np.arange(3)
    turn_BL, turn_B = np.array([[7, 13, 2], [0, 0, 0], [19, 0, 0]], np.int32), np.array([3, 0, 1])
    tokens_BL = np.zeros((3, MAX_LENGTH), np.int32)
    tokens_BL[:, :4] = PROMPTS_BL
    grow(routing, tokens_BL, LENGTHS_B, 2)
    for b, count in enumerate(turn_B):
        end = LENGTHS_B[b] + 2
        tokens_BL[b, end : end + count] = turn_BL[b, :count]
    grow(routing, tokens_BL, LENGTHS_B + 2 + turn_B, 3)

    state = run(routing, sampling=GREEDY, max_new_tokens=2).state
    # As if row 0 had drawn a stop sequence: the next turn opens it again.
    state = dataclasses.replace(state, done_B=jnp.array([True, False, False]))
    state = extend(*model, state, turn_BL, turn_B)
    found = resume(*model, state, max_new_tokens=3, sampling=GREEDY)
    for b in rows:
        end = LENGTHS_B[b] + 2 + turn_B[b]
        np.testing.assert_array_equal(found.tokens_BO[b], tokens_BL[b, end : end + 3])
    np.testing.assert_array_equal(found.state.cache.positions_B, LENGTHS_B + turn_B + 5)


@pytest.mark.parametrize(
    ("tokens_BL", "lengths_B", "message"),
    [
        (np.zeros((2, 1), int), None, "tokens_BL = 2: must have a row for each of the state's 3"),
        (np.zeros((3, 1), int), [1, 2, 1], "lengths_B = 2: must be at most their width, 1"),
        (np.zeros((3, 1), int), [1, -1, 1], "lengths_B = -1: must be 0 or more"),
        (np.zeros((3, 4), int), [0, 4, 1], "'9 tokens': with 4 new ones .* max_length = 12"),
    ],
)
def test_a_turn_that_does_not_fit_is_one_line(tokens_BL, lengths_B, message):
    with pytest.raises(InputError, match=message):
        extend(None, None, greedy("predictor").state, tokens_BL, lengths_B)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens_BL": np.zeros((2, 0), int)}, "prompt = '': is empty"),
        ({"lengths_B": np.array([3, 0])}, "prompt = '': is empty"),
        ({"lengths_B": np.array([3, 5])}, "lengths_B = 5: must be at most"),
        ({"max_length": 3}, "prompt = '4 tokens': with 8 new ones does not fit .* max_length = 3"),
        ({"max_length": 11}, "with 8 new ones does not fit the cache of max_length = 11"),
        (
            {"routing": "trained"},
            "routing = 'trained': must be causal, or the name of a rule; training looks at tokens "
            "not yet drawn",
        ),
        ({"max_new_tokens": -1}, "max_new_tokens = -1: must be 0 or more"),
        ({"stop": ((4,), ())}, r"stop = \(\): "),
        ({"tokens_BL": np.zeros(4, int)}, r"tokens_BL = \(4,\): must have the shape \(B, L\)"),
        ({"lengths_B": np.array([3])}, r"lengths_B = \(1,\): must have one length for each of 2"),
        ({"seed": -1}, "seed = -1: must be 0 or more"),
        ({"seed": 2**32}, "seed = 4294967296: must be .* below"),
        ({"slack": 0.0}, "slack = 0.0: must be greater than 0"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_compiled(options, message):
    small = {"tokens_BL": np.zeros((2, 4), int), "max_new_tokens": 8, "routing": "predictor"}
    with pytest.raises(InputError, match=message) as caught:
        generate(None, None, **small | options)  # no model: whatever uses one fails otherwise
    assert "\n" not in str(caught.value)


def test_a_routing_that_the_model_has_not_is_one_line():
    with pytest.raises(InputError, match="'both': must be one of trained, causal, paced, predic"):
        generate(*model_of(ROUTED), PROMPTS_BL, max_new_tokens=1, routing="both")


def test_nothing_more_to_draw_or_to_read_leaves_a_state_as_it_is():
    state = greedy("predictor").state
    found = resume(None, None, state, max_new_tokens=0, sampling=GREEDY)
    assert found.tokens_BO.shape == found.overflow_BO.shape == (3, 0)
    assert found.state is state
    assert extend(None, None, state, np.zeros((3, 0), int)) is state
    with pytest.raises(InputError, match="max_new_tokens = -1: must be 0 or more"):
        resume(None, None, state, max_new_tokens=-1, sampling=GREEDY)


def test_what_finds_no_slot_is_counted_token_by_token():
    found = run("predictor", sampling=GREEDY, slack=0.5)
    graphdef, params = model_of(ROUTED)
    tokens_BL = np.zeros((3, MAX_LENGTH), np.int32)
    for b, length in enumerate(LENGTHS_B):
        tokens_BL[b, :length] = PROMPTS_BL[b, :length]
        tokens_BL[b, length : length + NEW] = found.tokens_BO[b]
    valid_BL = np.arange(MAX_LENGTH) < (LENGTHS_B + NEW)[:, None]
    model = nnx.merge(graphdef, params)
    _, records = model(tokens_BL, jnp.asarray(valid_BL, jnp.int32), routing="predictor", slack=0.5)
    missed_BL = np.asarray(records["1_mod"].requested_BL & ~records["1_mod"].selected_BL)[0]
    assert missed_BL.any()
    for b, length in enumerate(LENGTHS_B):
        np.testing.assert_array_equal(found.overflow_BO[b], missed_BL[b, length : length + NEW])


def test_a_full_cache_cannot_be_resumed():
    with pytest.raises(InputError, match=r"'12 tokens': with 1 new ones .* max_length = 12"):
        resume(None, None, greedy("predictor").state, max_new_tokens=1, sampling=GREEDY)


def test_a_threshold_that_was_never_measured_is_said():
    graphdef, state = nnx.split(Transformer(ROUTED, rngs=nnx.Rngs(0)))
    read = functools.partial(
        generate, graphdef, tokens_BL=PROMPTS_BL[:1], max_new_tokens=0, max_length=MAX_LENGTH
    )
    with pytest.warns(
        UserWarning, match=r"^\S+mod/rule selects by a threshold that was never measured"
    ):
        read(state, routing="threshold")
    _, records = nnx.merge(graphdef, state)(PROMPTS_BL, routing="trained")
    at_paths = {f"stack/blocks/{name}": record for name, record in records.items()}
    observed, count = modjax.observe(state, at_paths, 0, stacked=True)
    assert count == 1
    for weights, routing in ((observed, "threshold"), (state, "predictor")):
        read(weights, routing=routing)  # warnings are errors
