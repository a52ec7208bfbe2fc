"""TUF repository of the fleet: the bundles that devices may install.

create           new repository                    publish, revoke   add a bundle, remove a bundle
key_rotation     replace the key of a role         root_rotation     drafts of the next root
upkeep           renewal before expiry             status            contents, keys, expiry
mirror           copy to a stick or web server     signature_chain   who signed which metadata
edition          read and write what clients see

Terms are those of the TUF specification 1.0.34. Root lists the keys of the top-level roles. Targets delegates to one
role per bundle. Snapshot and timestamp, whose keys are online, state which versions belong together.
"""
