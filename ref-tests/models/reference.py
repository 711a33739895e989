"""Random models, the reference forward (float32 and float64) and the choice of test tokens.

Must not know GGUF: it sees transformers' models only.
"""
import contextlib
import copy

import numpy as np
import torch
import transformers

import zoo

MATRIX_GAIN = {"q_proj": 1.6, "k_proj": 1.6, "q_b_proj": 1.6, "lm_head": 2.5}


def config_of(entry):
    """transformers' configuration of an entry, eager attention and experts."""
    cls = getattr(transformers, entry.model)
    return cls, cls.config_class(**entry.config)


def build(entry):
    """The seeded random model of an entry in float32, weights rounded to the entry's `store` type.

    Matrices have a standard deviation near 1/sqrt(columns), Q, K, gates and output more, so that attention looks at
    single tokens, experts differ clearly and logits are not flat. Norm weights lie around 1.
    """
    cls, cfg = config_of(entry)
    model = cls._from_config(cfg, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32)
    g = torch.Generator().manual_seed(1000 + entry.seed)
    tied = cfg.tie_word_embeddings
    with torch.no_grad():
        for name, p in list(model.named_parameters()) + [b for b in model.named_buffers() if "e_score" in b[0]]:
            r = torch.randn(p.shape, generator=g)
            if "norm" in name:
                mean = entry.final_norm if name == "model.norm.weight" else 1.0
                p.copy_(mean - (entry.arch == "gemma3") + 0.15 * r)
            elif "e_score" in name:
                p.copy_(0.1 * r)
            elif name.endswith("bias"):
                p.copy_(0.3 * r)
            elif "embed_tokens" in name:
                p.copy_(r * (entry.embedding or (2.5 / p.shape[1] ** 0.5 if tied else 1.0)))
            else:
                gain = entry.gate_gain if "mlp.gate." in name else 1.0
                gain = next((v for k, v in MATRIX_GAIN.items() if k in name), gain)
                p.copy_(gain * r / p.shape[-1] ** 0.5)
        if entry.store != "f32":
            kind = dict(f16=torch.float16, bf16=torch.bfloat16)[entry.store]
            for name, p in model.named_parameters():
                if p.dim() > 1 and "mlp.gate.weight" not in name:
                    p.copy_(p.to(kind).float())
    return model.eval()


@contextlib.contextmanager
def _double():
    """Make transformers' own casts to float32 (norms, softmax, gates, angles) casts to float64."""
    single, torch.float32, torch.float = torch.float32, torch.float64, torch.float64
    cast, torch.Tensor.float = torch.Tensor.float, torch.Tensor.double
    try:
        yield
    finally:
        torch.float32 = torch.float = single
        torch.Tensor.float = cast


@torch.no_grad()
def logits(model, tokens):
    """float32 [n, vocab]: the logits after each token of one sequence."""
    return model(torch.tensor([tokens]), use_cache=False).logits[0].numpy()


@torch.no_grad()
def logits_f64(model, tokens):
    """The same forward with every step in float64, float64 [n, vocab]."""
    state = {k: v.double() for k, v in model.state_dict().items()}
    with _double():
        twin = type(model)._from_config(model.config, attn_implementation="eager", experts_implementation="eager",
                                        dtype=torch.float64).double()
        twin.load_state_dict(state)
        out = twin.eval()(torch.tensor([tokens]), use_cache=False).logits[0]
    assert out.dtype == torch.float64
    return out.numpy()


def kl(p, q):
    """KL(p || q) in nats per row, from logits [n, vocab], in float64."""
    p, q = np.asarray(p, np.float64), np.asarray(q, np.float64)
    p, q = (x - x.max(-1, keepdims=True) for x in (p, q))
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    return (np.exp(p) * (p - q)).sum(-1)


def compare(p, q):
    """How far logits q lie from the reference p: mean and max KL, share of rows with the same top token."""
    d = kl(p, q)
    same = float((np.argmax(p, -1) == np.argmax(q, -1)).mean())
    return dict(mean_kl=float(d.mean()), median_kl=float(np.median(d)), max_kl=float(d.max()), top1=same)


def top_margin(rows):
    """Distance between the best and second-best logit of each row."""
    best = np.sort(rows, -1)
    return best[..., -1] - best[..., -2]


class RouterWatch:
    """Records, for each token, by how much the choice of experts was decided, over all layers (smallest).

    In units of router logits for a softmax gate, of scores x 4 (the slope of the sigmoid at 0) for a sigmoid gate.
    """

    def __init__(self, model):
        self.hooks, self.margin, self.rule = [], None, None
        for m in model.modules():
            if type(m).__name__.lower().endswith("topkrouter"):
                self.hooks.append(m.register_forward_hook(self._seen))

    def _seen(self, m, _, out):
        x, k = out[0], m.top_k
        probs = x.softmax(-1)
        if hasattr(m, "e_score_correction_bias"):
            x = 4 * (x.sigmoid() + m.e_score_correction_bias)
            groups, best = m.num_group, 2
        else:
            limited = getattr(m, "topk_method", "greedy") == "group_limited_greedy"
            groups, best = (m.num_group if limited else 1), 1
        margin = torch.full(x.shape[:1], float("inf"))
        if groups and groups > 1:
            g = x.view(x.shape[0], groups, -1)
            s = g.topk(best, -1).values.sum(-1).sort(-1, descending=True)
            if best == 1:
                two = probs.view(g.shape).topk(2, -1).values.sum(-1).topk(m.topk_group, -1).indices.sort(-1).values
                ours = s.indices[:, :m.topk_group].sort(-1).values
                self.rule = self.rule + (two != ours).any(-1) if self.rule is not None else (two != ours).any(-1)
            margin = s.values[:, m.topk_group - 1] - s.values[:, m.topk_group]
            x = torch.full_like(g, float("-inf")).scatter(
                1, s.indices[:, :m.topk_group, None].expand(-1, -1, g.shape[-1]),
                g.gather(1, s.indices[:, :m.topk_group, None].expand(-1, -1, g.shape[-1]))).flatten(1)
        s = x.sort(-1, descending=True).values
        margin = torch.minimum(margin, s[:, k - 1] - s[:, k])
        self.margin = margin if self.margin is None else torch.minimum(self.margin, margin)

    def take(self):
        """(margins, in how many layers DeepSeek-V3's rule for groups would choose others or None) since last asked."""
        out = self.margin, self.rule
        self.margin = self.rule = None
        return out

    def close(self):
        for h in self.hooks:
            h.remove()


@torch.no_grad()
def choose_tokens(model, n, seed, candidates=24):
    """n token ids, each the best of some random candidates: widest choice of experts, then clearest top token.

    A test that compares logits is then not decided by a coin that rounding flips. Returns (ids, figures): the smallest
    margin of a choice of experts (None without experts) and of a top logit, and on how many tokens DeepSeek-V2's rule
    for groups (best expert) chooses others than DeepSeek-V3's (sum of the two best) would.
    """
    r = np.random.default_rng(seed)
    watch, size = RouterWatch(model), model.config.vocab_size
    ids, routes, tops, rules, past = [], [], [], 0, None
    for _ in range(n):
        pick = r.choice(size, candidates, replace=False)
        trial = copy.deepcopy(past)
        if trial is not None:
            trial.batch_repeat_interleave(candidates)
        rows = model(torch.tensor(pick)[:, None], past_key_values=trial, use_cache=True).logits[:, -1].numpy()
        top, (route, rule) = np.minimum(top_margin(rows), 0.5), watch.take()
        if route is None:
            best = int(np.argmax(top))
        else:
            route = route.numpy()
            good = route - 10.0 * (top < 0.1)
            if rule is not None:
                good += 0.2 * (rule.numpy() > 0)
            best = int(np.argmax(good))
            routes.append(float(route[best]))
            rules += 0 if rule is None else int(rule[best] > 0)
        ids.append(int(pick[best]))
        past = model(torch.tensor([ids[-1:]]), past_key_values=past, use_cache=True).past_key_values
        watch.take()
        tops.append(float(top_margin(rows[best])))
    watch.close()
    return ids, dict(smallest_expert_margin=min(routes) if routes else None, smallest_top1_margin=min(tops),
                     tokens_where_group_rules_differ=rules)
