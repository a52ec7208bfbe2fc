"""Evidence folder: a signed record of a fleet's models, decisions and incidents for readers outside the fleet.

make     gather, write, sign                            format/  files, manifest, limits, framework mapping
gather/  facts from the database and its signed messages    page/    index.html
verify/  check of a folder with public keys only
"""
