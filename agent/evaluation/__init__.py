"""A bundle over files of data: what it answers, and how good that is.

blocks.py, csvfile.py, tablefile.py   data files as blocks of rows, in bounded memory
answers.py                            rows to answers
output.py, run.py                     `model run`: answers to a file, resumable
examples.py                           windows with what was true of them
resampling.py, metrics.py             figures with intervals
slicing.py, ablation.py, robustness.py, leakage.py, hints.py, against.py, latency.py   questions asked of a model
document.py, judge.py                 all of it as one document
report.py, cards.py                   the document for people
"""
