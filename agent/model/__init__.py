"""A model and what belongs to it.

manifest  what a bundle says of itself      runtime   the only importer of TFLite
bundle    read and verify a bundle          probe     try it in a child process
golden    prove it on this CPU              activate  probe, then load
features  rows to model windows             spec      what a bundle is to be made of
scores    outputs to labels and scores      pack      make and sign a bundle
data      files a bundle is made from       shipped   what comes with the agent
"""
