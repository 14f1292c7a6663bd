"""Where training sets come from: one module per format, one function that tells them apart.

`registry.open_source` recognises a source and asks the module of its format for the images;
`pyflocality.TrainingSet.load` is the public way in.
"""
