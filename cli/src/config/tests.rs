//! The example, the schema and the loader say the same.

use std::path::Path;

use serde_json::{Map, Value};

use super::*;

const EXAMPLE: &str = include_str!("../../../docs/kiln.example.toml");
const SCHEMA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/kiln.schema.json");

fn load_text(text: &str) -> Result<File, ConfigError> {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    read(file.path()).map(|(_, file)| file)
}

/// Lines with `#` and no blank are keys without a default, so uncommenting them must give a valid file.
fn example_with_every_key() -> String {
    let key = |rest: &&str| !rest.starts_with(' ') && !rest.starts_with(':');
    let uncomment = |line: &'static str| line.strip_prefix('#').filter(key).unwrap_or(line);
    EXAMPLE.lines().map(|line| uncomment(line).to_owned() + "\n").collect()
}

fn json(text: &str) -> Value {
    serde_json::to_value(text.parse::<toml::Table>().unwrap()).unwrap()
}

/// What a reference in the schema leads to.
fn resolve<'a>(root: &'a Value, mut node: &'a Value) -> &'a Value {
    loop {
        let inner = node.get("allOf").and_then(|all| all.get(0)).unwrap_or(node);
        let Some(name) = inner.get("$ref").and_then(Value::as_str) else { return node };
        node = root.pointer(name.trim_start_matches('#')).unwrap();
    }
}

/// Every key of the schema that the file lacks.
fn lacking(root: &Value, node: &Value, file: &Value, path: &str, found: &mut Vec<String>) {
    let node = resolve(root, node);
    if let Some(items) = node.get("items") {
        return lacking(root, items, &file[0], path, found);
    }
    for (name, inner) in node.get("properties").and_then(Value::as_object).unwrap_or(&Map::new()) {
        let path = format!("{path}.{name}");
        match file.get(name) {
            Some(value) => lacking(root, inner, value, &path, found),
            None => found.push(path),
        }
    }
}

#[test]
fn the_example_file_holds_the_defaults_and_every_key() {
    assert_eq!(load_text(EXAMPLE).unwrap(), File::default());
    assert_eq!(load_text("").unwrap(), File::default());
    let full = example_with_every_key();
    let _ = load_text(&full).unwrap();
    let (root, mut found) = (schema().to_value(), Vec::new());
    lacking(&root, &root, &json(&full), "", &mut found);
    assert_eq!(found, Vec::<String>::new());
    // The same walk over a file without them sees that they are missing.
    lacking(&root, &root, &json(EXAMPLE), "", &mut found);
    assert!(found.iter().any(|key| key == ".build.limits.memory"), "{found:?}");
}

#[test]
fn the_committed_schema_is_that_of_the_loader() {
    let fresh = serde_json::to_string_pretty(&schema()).unwrap() + "\n";
    if std::env::var_os("KILN_WRITE_SCHEMA").is_some() {
        std::fs::write(SCHEMA, &fresh).unwrap();
    }
    let committed = std::fs::read_to_string(SCHEMA).unwrap();
    assert!(committed == fresh, "docs/kiln.schema.json is old; run this test with KILN_WRITE_SCHEMA=1");
}

#[test]
fn what_is_shown_is_read_as_the_same() {
    for text in
        ["", EXAMPLE, &example_with_every_key(), "[build]\ntimeout = \"1h30m\"\n[network]\nallow = []\n"]
    {
        let file = load_text(text).unwrap();
        let shown = toml::to_string(&file).unwrap();
        assert_eq!(load_text(&shown).unwrap(), file, "{shown}");
    }
}

#[test]
fn secrets_are_not_shown() {
    let text = "[build.proxy]\nhttp = \"http://me:hunter2@proxy\"\n[[plugin]]\nname = \"a\"\nmode = \"audit\"\n\
                source = \"file:a.wasm\"\nsettings = { token = \"hunter2\" }\n";
    let mut file = load_text(text).unwrap();
    mask::mask(&mut file);
    let shown = toml::to_string(&file).unwrap();
    assert!(!shown.contains("hunter2"), "{shown}");
    assert!(shown.contains("http://me:***@proxy") && shown.contains("token"), "{shown}");
}

const PLUGIN: &str = "[[plugin]]\nname = \"a\"\nsource = \"file:a\"\nmode = \"enforce\"\n";

/// Each with what the loader says. A schema sees all of these too.
const BROKEN: &[(&str, &str)] = &[
    ("[build]\nmemory = 1\n", ":2: build.memory: unknown field `memory`"),
    ("[build]\ntiemout = \"1h\"\n", "did you mean `timeout`?"),
    ("[builds]\n", ":1: builds: unknown field `builds`"),
    ("[build]\ntimeout = \"soon\"\n", ":2: build.timeout: `soon` is not a duration"),
    ("[build]\ntimeout = 60\n", ":2: build.timeout: invalid type: integer `60`"),
    ("[build]\nnetwork = \"isolate\"\n", ":2: build.network: unknown variant `isolate`"),
    ("[build]\nattempts = 21\n", ":2: build.attempts: 21 is not between 1 and 20"),
    ("[build.limits]\ndisk = \"20GiB\"\npids = 3\n", ":3: build.limits.pids: 3 is too small; at least 64"),
    ("[build.limits]\npids = -1\n", ":2: build.limits.pids: invalid value"),
    ("[build.limits]\ncpus = 0.0\n", ":2: build.limits.cpus: 0 is not between 0.01 and 65536"),
    ("[build.limits]\ndisk = \"20 parsecs\"\n", ":2: build.limits.disk: `20 parsecs` is not a size"),
    ("[build.limits]\ndisk = true\n", ":2: build.limits.disk: invalid type: boolean `true`, expected a size"),
    ("[network]\nallow = \"10.0.0.0/8\"\n", ":2: network.allow: invalid type"),
    ("[[registry]]\nlocation = \"a.example\"\n", ":1: registry.0: missing field `prefix`"),
    ("[orchestrator]\nper_namespace = 0\n", ":2: orchestrator.per_namespace: 0 is too small; at least 1"),
    ("[orchestrator.retention]\nbuild = 1\n", ":2: orchestrator.retention.build: unknown field"),
    ("[orchestrator.retention]\nkeep = \"30 days\"\n", ":2: orchestrator.retention.keep: `30 days` is not"),
    (
        "[[plugin]]\nname = \"a\"\nsource = \"oci:a\"\nmode = \"enforce\"\n",
        ":3: plugin.0.source: `oci:a` is no",
    ),
    ("[[plugin]]\nname = \"a b\"\nsource = \"file:a\"\nmode = \"audit\"\n", ":2: plugin.0.name: 1 to 64"),
];

#[test]
fn broken_files_are_refused_by_the_loader_and_by_the_schema() {
    let validator = jsonschema::validator_for(&schema().to_value()).unwrap();
    for (text, wanted) in BROKEN {
        let message = load_text(text).unwrap_err().to_string();
        assert!(message.contains(wanted), "{text:?} gave {message}");
        assert!(!validator.is_valid(&json(text)), "the schema takes {text:?}");
    }
    for text in ["", EXAMPLE, &example_with_every_key(), PLUGIN] {
        let errors: Vec<_> = validator.iter_errors(&json(text)).map(|e| e.to_string()).collect();
        assert_eq!(errors, Vec::<String>::new());
        assert!(validator.is_valid(&json(&toml::to_string(&load_text(text).unwrap()).unwrap())));
    }
}

#[test]
fn what_no_schema_can_say_is_refused_with_line_and_key() {
    let twins = PLUGIN.repeat(2);
    for (text, wanted) in [
        ("[build\n", ":1: "),
        ("[build]\n\ntimeout = \"0s\"\n", ":3: build.timeout: must be longer than 0s"),
        ("[build.limits]\nfile_size = \"63MiB\"\n", ":2: build.limits.file_size: 66060288 is too small"),
        ("build.limits.memory = \"1MiB\"\n", ":1: build.limits.memory: 1048576 is too small"),
        ("[build.limits]\ncpus = nan\n", ":2: build.limits.cpus: NaN is not between"),
        ("[logs]\nkeep = 1\nmax_bytes = 1\n", ":3: logs.max_bytes: 1 is too small; at least 65536"),
        ("[network]\nallow = [\"10.0.0.0/33\"]\n", ":2: network.allow: `10.0.0.0/33` is not a network"),
        ("[network]\nallow = [\"169.254.169.254\"]\n", "RUN never reaches it"),
        ("[network]\nallow = [\"127.0.0.0/8\"]\n", "RUN never reaches it"),
        (
            "[[registry]]\nprefix = \"a\"\n[[registry]]\nprefix = \"B\"\n",
            ":3: registry.1: [[registry]] prefix",
        ),
        ("[orchestrator.retention]\nkeep = \"1m\"\n", ":2: orchestrator.retention.keep: 60s is too short"),
        (&twins, ":6: plugin.1.name: `a` appears twice"),
    ] {
        let message = load_text(text).unwrap_err().to_string();
        assert!(message.contains(wanted), "{text:?} gave {message}");
    }
    let error = load(Path::new("/nowhere/kiln.toml")).unwrap_err();
    assert_eq!(error.to_string(), "/nowhere/kiln.toml: cannot be read");
}
