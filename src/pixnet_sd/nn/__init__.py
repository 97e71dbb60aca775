"""The network: encoder, decoder, losses, aggregation operators. Needs torch, timm, numpy and scipy only."""
