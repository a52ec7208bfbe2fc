"""The evidence folder: what a fleet's models did, who decided it and what is not known, for people who were not there.

make       the flow: gather, write, sign            verify     the other end: that folder and public keys, nothing else
reading    what the database has                    manifest   what is in the folder, and which keys count
gather     one pass over the signed messages        contents   the files of the folder, one struct a line or member
incidents, decisions, running, accuracy, drifting, bundles, trust, software     what is known, one room each
mapping    which file supports which point of NIST AI RMF and ISO/IEC 42001, and what it does not show
claims, papers     what the folder says, held against what was signed
page, deployed, decided, observed, assurance, elements, pictures, words     index.html
"""
