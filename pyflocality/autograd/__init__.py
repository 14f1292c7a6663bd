"""Where torch's derivatives, compiler and transforms meet the denoisers."""
