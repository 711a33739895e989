"""The demo model as a PyTorch module: DeepSeek-V3's structure (MLA, mixture of experts) in miniature.

Parameter names are those of Hugging Face's DeepseekV3ForCausalLM on its hub, one tensor per expert, so that a state
dict saved here loads there. Must not know about training, tokenizers or files.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

CFG = dict(hidden_size=256, num_hidden_layers=5, num_attention_heads=4, q_lora_rank=256, kv_lora_rank=256,
           qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64, intermediate_size=768, moe_intermediate_size=256,
           n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1, n_group=1, topk_group=1,
           first_k_dense_replace=1, routed_scaling_factor=1.0, norm_topk_prob=True, vocab_size=2048,
           max_position_embeddings=512, rope_theta=10000.0, rms_norm_eps=1e-6)


def linear(inputs, outputs):
    """A projection without bias."""
    return nn.Linear(inputs, outputs, bias=False)


class Norm(nn.Module):
    """RMS norm, computed in float32."""

    def __init__(self, n):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))

    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), CFG["rms_norm_eps"]).to(x.dtype)


def rotate(x, cos, sin):
    """Rotary embedding over adjacent pairs; x [..., T, rope_dim], cos and sin [T, rope_dim / 2]."""
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


class Attention(nn.Module):
    """Multi-head latent attention, expanded form (DeepSeek-V2, section 2.1)."""

    def __init__(self):
        super().__init__()
        c = CFG
        h, d = c["num_attention_heads"], c["hidden_size"]
        self.nope, self.rope, self.v, self.h = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"], h
        self.q_a_proj, self.q_a_layernorm = linear(d, c["q_lora_rank"]), Norm(c["q_lora_rank"])
        self.q_b_proj = linear(c["q_lora_rank"], h * (self.nope + self.rope))
        self.kv_a_proj_with_mqa = linear(d, c["kv_lora_rank"] + self.rope)
        self.kv_a_layernorm = Norm(c["kv_lora_rank"])
        self.kv_b_proj = linear(c["kv_lora_rank"], h * (self.nope + self.v))
        self.o_proj = linear(h * self.v, d)

    def forward(self, x, cos, sin):
        b, t, _ = x.shape
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))).view(b, t, self.h, -1).transpose(1, 2)
        kv, kr = self.kv_a_proj_with_mqa(x).split([CFG["kv_lora_rank"], self.rope], -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(kv)).view(b, t, self.h, -1).transpose(1, 2)
        k, v = kv.split([self.nope, self.v], -1)
        kr = rotate(kr.unsqueeze(1).float(), cos, sin).to(k.dtype).expand(b, self.h, t, self.rope)
        qr = rotate(q[..., self.nope:].float(), cos, sin).to(k.dtype)
        q, k = torch.cat((q[..., :self.nope], qr), -1), torch.cat((k, kr), -1)
        # Values are padded to the keys' length: one fused call wants them equal.
        v = F.pad(v, (0, self.nope + self.rope - self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)[..., :self.v]
        return self.o_proj(y.transpose(1, 2).reshape(b, t, -1))


class MLP(nn.Module):
    """SwiGLU feed-forward of width f."""

    def __init__(self, f):
        super().__init__()
        d = CFG["hidden_size"]
        self.gate_proj, self.up_proj, self.down_proj = linear(d, f), linear(d, f), linear(f, d)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Gate(nn.Module):
    """Holds the router's weights under the hub's names."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(CFG["n_routed_experts"], CFG["hidden_size"]) * 0.02)
        self.register_buffer("e_score_correction_bias", torch.zeros(CFG["n_routed_experts"]))


class MoE(nn.Module):
    """Sigmoid gating with a correction bias that balances the load without an auxiliary loss (DeepSeek-V3, 2.1.2)."""

    def __init__(self):
        super().__init__()
        f = CFG["moe_intermediate_size"]
        self.gate, self.experts = Gate(), nn.ModuleList(MLP(f) for _ in range(CFG["n_routed_experts"]))
        self.shared_experts = MLP(f * CFG["n_shared_experts"])

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        k = CFG["num_experts_per_tok"]
        p = torch.sigmoid(F.linear(flat.float(), self.gate.weight.float()))
        chosen = (p.detach() + self.gate.e_score_correction_bias).topk(k, -1).indices
        w = p.gather(1, chosen)
        w = w / (w.sum(-1, keepdim=True) + 1e-20) * CFG["routed_scaling_factor"]
        out = torch.zeros_like(flat)
        order = chosen.flatten().argsort()
        load = torch.bincount(chosen.flatten(), minlength=len(self.experts))
        for e, part in enumerate(order.split(load.tolist())):
            if len(part):
                t = part // k
                out.index_add_(0, t, self.experts[e](flat[t]) * w.flatten()[part, None].to(flat.dtype))
        if self.training:
            self.gate.e_score_correction_bias += 0.001 * torch.sign(load.float().mean() - load.float())
        return (out + self.shared_experts(flat)).view_as(x)


class Layer(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the stream."""

    def __init__(self, i):
        super().__init__()
        d = CFG["hidden_size"]
        self.input_layernorm, self.self_attn, self.post_attention_layernorm = Norm(d), Attention(), Norm(d)
        self.mlp = MLP(CFG["intermediate_size"]) if i < CFG["first_k_dense_replace"] else MoE()

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Model(nn.Module):
    """ids [B, T] -> logits [B, T, vocabulary]."""

    def __init__(self):
        super().__init__()
        d, v = CFG["hidden_size"], CFG["vocab_size"]
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(v, d)
        self.model.layers = nn.ModuleList(Layer(i) for i in range(CFG["num_hidden_layers"]))
        self.model.norm, self.lm_head = Norm(d), linear(d, v)
        into_stream = math.sqrt(2 * CFG["num_hidden_layers"])
        for n, p in self.named_parameters():
            if p.dim() > 1:
                last = n.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / (into_stream if last else 1))

    def forward(self, ids):
        r = CFG["qk_rope_head_dim"]
        f = CFG["rope_theta"] ** (-torch.arange(0, r, 2, device=ids.device).float() / r)
        a = torch.arange(ids.shape[1], device=ids.device).float()[:, None] * f
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x, a.cos(), a.sin())
        return self.lm_head(self.model.norm(x))
