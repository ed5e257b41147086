"""The passes of the compiler, one file and one job each; :mod:`fomoh_fx.passes.pipeline` runs them in order."""
