"""MQTT and TLS. The only importer of paho."""
