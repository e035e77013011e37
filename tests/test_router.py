"""The router and the losses that keep its experts evenly used, against transformers and plain torch."""

import threading

import pytest
import torch
from torch import distributed as dist
from torch.utils.checkpoint import checkpoint

import farskip_fused as ff
from farskip_fused import reference, router_losses
from farskip_fused.router import Router, record_routing
from tests.numerics import DEVICE, assert_close

HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
OPTIONS = {"scoring": "sigmoid", "normalize_top_k": True, "routed_scaling": 2.5, "correction_bias": True}


def make_router(hidden=40, num_experts=8, top_k=3, dtype=torch.float32, **options):
    router = Router(hidden, num_experts, top_k, device=DEVICE, dtype=dtype, **options)
    with torch.no_grad():
        router.weight.normal_(std=hidden**-0.5)
        if router.e_score_correction_bias is not None:
            router.e_score_correction_bias.uniform_(-0.2, 0.2)
    return router


@pytest.mark.parametrize("tokens", [7, 500])
@pytest.mark.parametrize("tile_rows", [0, 32])
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_gradients_reach_inputs_and_weight_from_weights_and_logits(dtype, tile_rows, tokens):
    router = make_router(dtype=dtype, **OPTIONS)
    x = torch.randn(tokens, 40, device=DEVICE, dtype=dtype, requires_grad=True)
    routing = router.route(x, tile_rows)
    by_weights, by_logits = torch.randn_like(routing.weights), torch.randn_like(routing.logits)
    torch.autograd.backward((routing.weights, routing.logits), (by_weights, by_logits))

    exact_x, exact_weight = x.detach().double().requires_grad_(), router.weight.detach().double().requires_grad_()
    logits = exact_x @ exact_weight.T
    scores = logits.sigmoid().gather(1, routing.ids.long())
    weights = 2.5 * scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)
    torch.autograd.backward((weights, logits), (by_weights.double(), by_logits.double()))
    assert_close(routing.weights, weights, torch.float32)
    assert_close(routing.logits, logits, torch.float32)
    assert_close(x.grad, exact_x.grad, dtype)
    assert_close(router.weight.grad, exact_weight.grad, dtype)


@pytest.mark.parametrize("used", ["weights", "logits"])
def test_a_gradient_of_one_output_is_enough(used):
    router = make_router()
    x = torch.randn(6, 40, device=DEVICE, requires_grad=True)
    getattr(router.route(x), used).square().sum().backward()
    exact = x.detach().double().requires_grad_()
    logits = exact @ router.weight.detach().double().T
    value = logits if used == "logits" else reference.route(logits, 3, sigmoid=False, normalise=False, scaling=1.0)[1]
    value.square().sum().backward()
    assert_close(x.grad, exact.grad, torch.float32)


def test_only_the_input_and_small_tensors_are_kept_for_backward():
    router = make_router(hidden=1024)
    x = torch.randn(64, 1024, device=DEVICE, dtype=HALF, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        router.route(x, 32)
    large = [tensor for tensor in kept if tensor.numel() >= x.numel()]
    assert [tensor.data_ptr() for tensor in large] == [x.data_ptr()]


def test_a_model_in_half_precision_routes_in_float32_under_autocast():
    router = make_router()
    x = torch.randn(9, 40, device=DEVICE, requires_grad=True)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        routing = router.route(x)
        routing.logits.sum().backward()
    assert_close(routing.logits, x.double() @ router.weight.double().T, torch.float32)
    assert_close(x.grad, router.weight.double().sum(dim=0).expand_as(x), torch.float32)


def test_the_compiled_router_is_the_router():
    router = make_router(**OPTIONS)
    x = torch.randn(20, 40, device=DEVICE, requires_grad=True)

    def loss(x):
        routing = router.route(x, 32)
        return routing.weights.square().sum() + router_losses.router_z_loss(routing.logits), routing.layout.order

    value, order = torch.compile(loss, fullgraph=True, backend="aot_eager")(x)
    value.backward()
    gradient, x.grad = x.grad, None
    expected, expected_order = loss(x)
    expected.backward()
    assert torch.equal(value, expected) and torch.equal(order, expected_order) and torch.equal(gradient, x.grad)


def test_the_operator_keeps_the_rules_of_torch_library():
    router = make_router(**OPTIONS)
    x = torch.randn(5, 40, device=DEVICE, requires_grad=True)
    # Not the comparison of a compiled call's values: entries of the layout past its counts are undefined.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for tile_rows in (0, 32):
        arguments = (x, router.weight, router.e_score_correction_bias, 3, True, True, 2.5, 1, 1, tile_rows)
        torch.library.opcheck(torch.ops.farskip_fused.route.default, arguments, test_utils=tests)


def test_hidden_states_of_another_width_are_refused():
    with pytest.raises(ff.UsageError, match=r"\[4, 39\].*\[tokens, 40\]"):
        make_router()(torch.zeros(4, 39, device=DEVICE))


def test_every_kernel_can_be_loaded_before_the_first_call():
    router = make_router(**OPTIONS)
    router.load(max_tokens=700)
    assert router.weight.grad is None


class TestRecord:
    def make_layer(self):
        layer = ff.FusedMoE(40, 24, 8, 2, max_tokens=32, device=DEVICE)
        layer.setup()
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
        return layer

    def test_has_every_call_of_every_router_and_carries_gradients(self):
        layers = torch.nn.ModuleList([self.make_layer() for _ in range(2)])
        x = torch.randn(10, 40, device=DEVICE)
        with record_routing(layers) as record:
            for layer in (*layers, layers[0]):
                layer(x)
        layers[0](x)
        assert [name for name, _ in record] == ["0.gate", "1.gate", "0.gate"]
        for (_, routing), layer in zip(record, (*layers, layers[0]), strict=True):
            assert_close(routing.logits, x.double() @ layer.gate.weight.double().T, torch.float32)
        loss = router_losses.load_balancing_loss([r.logits for _, r in record], [r.ids for _, r in record])
        loss.backward()
        assert all(layer.gate.weight.grad.any() for layer in layers)

    def test_has_a_checkpointed_call_once(self):
        layer = self.make_layer()
        x = torch.randn(10, 40, device=DEVICE, requires_grad=True)
        with record_routing(layer) as record:
            y = checkpoint(layer, x, use_reentrant=False)
            (y.sum() + router_losses.router_z_loss(record[0][1].logits)).backward()
        assert len(record) == 1
        assert x.grad.any()

    def test_is_of_routers_and_one_at_a_time(self):
        with pytest.raises(ff.UsageError, match="no farskip_fused Router"), record_routing(torch.nn.Linear(2, 2)):
            pass
        layer = self.make_layer()
        with record_routing(layer), pytest.raises(ff.UsageError, match="recorded already"), record_routing(layer):
            pass
        with record_routing(layer):  # the one above has ended
            pass


class TestLosses:
    @pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
    @pytest.mark.parametrize("layers", [1, 3])
    @pytest.mark.parametrize("with_mask", [False, True], ids=["whole", "masked"])
    def test_load_balancing_is_that_of_transformers(self, family, layers, with_mask):
        from importlib import import_module

        theirs = import_module(f"transformers.models.{family}.modeling_{family}").load_balancing_loss_func
        logits = [torch.randn(2 * 17, 8, requires_grad=True) for _ in range(layers)]
        ids = [layer.topk(3).indices.to(torch.int32) for layer in logits]
        mask = (torch.rand(2, 17) < 0.7).long() if with_mask else None
        expected = theirs(tuple(logits), 8, 3, mask)
        gradients = torch.autograd.grad(expected, logits)
        found = router_losses.load_balancing_loss(logits, ids, mask)
        assert_close(found, expected, torch.float32)
        for gradient, other in zip(torch.autograd.grad(found, logits), gradients, strict=True):
            assert_close(gradient, other, torch.float32)
        if layers == 1:
            assert torch.equal(router_losses.load_balancing_loss(logits[0], ids[0], mask), found)

    @pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
    @pytest.mark.parametrize("with_mask", [False, True], ids=["whole", "masked"])
    def test_sequence_balance_is_the_papers_formula(self, scoring, with_mask):
        batch, length, num_experts, top_k = 3, 11, 6, 2
        logits = torch.randn(batch, length, num_experts, requires_grad=True)
        mask = torch.rand(batch, length) < 0.7 if with_mask else torch.ones(batch, length, dtype=torch.bool)
        expected = 0.0
        exact = logits.detach().double().requires_grad_()
        for sequence, counts in zip(exact, mask, strict=True):
            scores = sequence[counts].sigmoid() if scoring == "sigmoid" else sequence[counts].softmax(dim=-1)
            tokens = len(scores)
            for expert in range(num_experts):
                chosen = sum(expert in row.topk(top_k).indices for row in scores)
                frequency = num_experts / (top_k * tokens) * chosen
                expected += frequency * sum(row[expert] / row.sum() for row in scores) / tokens / batch
        expected.backward()
        options = {"scoring": scoring, "attention_mask": mask if with_mask else None}
        found = router_losses.sequence_balance_loss(logits, top_k, **options)
        found.backward()
        assert_close(found, expected, torch.float32)
        assert_close(logits.grad, exact.grad, torch.float32)
        ids = logits.topk(top_k, dim=-1).indices
        assert torch.equal(router_losses.sequence_balance_loss(logits, top_k, ids=ids, **options), found)

    def test_a_sequence_of_padding_adds_nothing(self):
        logits = torch.randn(2, 5, 4, requires_grad=True)
        mask = torch.tensor([[1] * 5, [0] * 5])
        found = router_losses.sequence_balance_loss(logits, 2, attention_mask=mask)
        assert_close(found, router_losses.sequence_balance_loss(logits[:1], 2) / 2, torch.float32)

    @pytest.mark.parametrize("with_mask", [False, True], ids=["whole", "masked"])
    def test_z_loss_is_the_mean_square_of_the_logsumexp(self, with_mask):
        layers = [3 * torch.randn(12, 5, requires_grad=True) for _ in range(2)]
        mask = torch.rand(3, 4) < 0.6 if with_mask else torch.ones(3, 4)
        kept = torch.cat([layer[mask.flatten().bool()] for layer in layers]).double()
        expected = kept.exp().sum(dim=-1).log().square().mean()
        assert_close(router_losses.router_z_loss(layers, mask if with_mask else None), expected, torch.float32)
        single = router_losses.router_z_loss(layers[0])
        assert_close(single, layers[0].double().logsumexp(dim=-1).square().mean(), torch.float32)

    def test_logits_without_their_ids_are_refused(self):
        with pytest.raises(ff.UsageError, match="2 layers and ids of 1"):
            router_losses.load_balancing_loss([torch.zeros(3, 4)] * 2, torch.zeros(3, 2, dtype=torch.int32))
        with pytest.raises(ff.UsageError, match=r"\[batch, sequence, experts\]"):
            router_losses.sequence_balance_loss(torch.zeros(3, 4), 2)


class TestCorrectionBias:
    def test_tokens_are_counted_but_for_unrouted_and_masked_ones(self):
        ids = torch.tensor([[0, 3], [3, -1], [1, 0]], device=DEVICE)
        assert router_losses.count_tokens(ids, 5).tolist() == [2, 1, 0, 2, 0]
        mask = torch.tensor([1, 1, 0], device=DEVICE)
        assert router_losses.count_tokens(ids.int(), 5, mask).tolist() == [1, 0, 0, 2, 0]

    def test_it_moves_by_the_rate_against_the_load(self):
        bias = torch.tensor([0.5, 0.0, -0.25, 0.0])
        router_losses.update_correction_bias(bias, torch.tensor([9, 3, 0, 4]), 0.125)
        assert bias.tolist() == [0.375, 0.125, -0.125, 0.0]

    def test_another_number_of_experts_is_refused(self):
        with pytest.raises(ff.UsageError, match=r"\[3\] experts"):
            router_losses.update_correction_bias(torch.zeros(4), torch.zeros(3), 0.1)

    def test_training_evens_out_the_load(self):
        router = make_router(top_k=2, **OPTIONS)
        with torch.no_grad():
            router.e_score_correction_bias.zero_()
            x = torch.randn(128, 40, device=DEVICE) + 10 * router.weight[0]  # everyone likes expert 0
            loads = []
            for step in range(40):
                load = router_losses.count_tokens(router(x)[0], 8)
                router_losses.update_correction_bias(router.e_score_correction_bias, load, 0.04 if step < 20 else 0.004)
                loads.append(int(load.max()))
        assert loads[0] > 110 and max(loads[-5:]) < 64  # 32 is even

    def test_ranks_sum_their_tokens_and_keep_their_own_counts(self):
        loads = [torch.tensor([5, 0, 1]), torch.tensor([0, 5, 1])]
        biases = [torch.zeros(3), torch.zeros(3)]
        store = dist.HashStore()

        def rank(index):
            options = dist.ProcessGroupGloo._Options()
            options._devices = [dist.ProcessGroupGloo.create_device(interface="lo")]
            group = dist.ProcessGroupGloo(store, index, 2, options)
            router_losses.update_correction_bias(biases[index], loads[index], 0.5, group)

        threads = [threading.Thread(target=rank, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert [bias.tolist() for bias in biases] == [[-0.5, -0.5, 0.5]] * 2
        assert [load.tolist() for load in loads] == [[5, 0, 1], [0, 5, 1]]
