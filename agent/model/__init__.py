"""A model and what belongs to it.

manifest  what a bundle says of itself      runtime   the only importer of TFLite
bundle    read and verify a bundle          probe     try it in a child process
golden    prove it on this CPU              activate  probe, then load
features  rows to model windows             derived   features of earlier rows
scores    outputs to labels and scores      inference all of these in order: rows in, answers out
spec      what a bundle is to be made of    pack      make and sign a bundle
data      files a bundle is made from       learn     calibration and thresholds from them
outline   what a .tflite says of itself     begin     a SPEC to fill in from that
images    rows made of pixels               sound     rows made of log-mel bands
shipped   what comes with the agent
"""
