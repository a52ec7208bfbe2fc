"""Wire format shared by devices and the fleet; pure, no I/O except for key files.

topics         topic tree, table of kinds      jws    detached signatures over exact payload bytes
messages       payload structs, verification   keys   Ed25519 keys, thumbprints, key files
runs           run-length encoded columns      key_rotation, commands, desired_state
"""
