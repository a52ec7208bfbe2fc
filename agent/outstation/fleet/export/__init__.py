"""Export: Parquet files of the fleet's messages, their manifest and its audit, and SQL over them."""
