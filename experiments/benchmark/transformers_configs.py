"""lmjax's configs as those of transformers, dropout off."""

import transformers

from experiments.benchmark.harness import Case


def transformers_config(case: Case) -> transformers.PretrainedConfig:
    return globals()[case.model](case.sizes)


def t5(c) -> transformers.T5Config:
    return transformers.T5Config(
        vocab_size=c.vocab,
        d_model=c.width,
        d_kv=c.head_width,
        d_ff=c.feed_forward,
        num_layers=c.layers,
        num_decoder_layers=c.decoder_layers,
        num_heads=c.heads,
        feed_forward_proj="gated-gelu" if c.gated else "relu",
        tie_word_embeddings=c.tied,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )


def bert(c) -> transformers.BertConfig:
    return transformers.BertConfig(
        vocab_size=c.vocab,
        max_position_embeddings=c.positions,
        hidden_size=c.width,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        intermediate_size=c.feed_forward,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def gpt2(c) -> transformers.GPT2Config:
    return transformers.GPT2Config(
        vocab_size=c.vocab,
        n_positions=c.positions,
        n_embd=c.width,
        n_layer=c.layers,
        n_head=c.heads,
        n_inner=c.feed_forward,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        pad_token_id=0,
    )


def bart(c) -> transformers.BartConfig:
    return transformers.BartConfig(
        vocab_size=c.vocab,
        max_position_embeddings=c.positions,
        d_model=c.width,
        encoder_layers=c.layers,
        decoder_layers=c.decoder_layers,
        encoder_attention_heads=c.heads,
        decoder_attention_heads=c.heads,
        encoder_ffn_dim=c.feed_forward,
        decoder_ffn_dim=c.feed_forward,
        dropout=0.0,
    )


def xlnet(c) -> transformers.XLNetConfig:
    return transformers.XLNetConfig(
        vocab_size=c.vocab,
        d_model=c.width,
        n_layer=c.layers,
        n_head=c.heads,
        d_inner=c.feed_forward,
        dropout=0.0,
        summary_last_dropout=0.0,
    )
