"""What crosses the air, used by both sides; pure, no I/O except for key files.

topics     the topic tree            jws    detached signatures over exact payload bytes
messages   payloads as typed values  keys   Ed25519 keys, thumbprints, key files
                                     curve  which 32 bytes can be a key of somebody
"""
