"""Commands of `outstation fleet` about its data as a whole: export, SQL, retention, migration."""
