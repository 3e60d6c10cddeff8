"""The mathematics of diffusion; a network is only ever `f(x_t, t, cond)` here."""
