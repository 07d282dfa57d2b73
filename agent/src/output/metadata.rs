//! What `--metadata-file` and `--iidfile` say (pure).

use std::collections::BTreeMap;

use kiln_protocol::result::PhaseDuration;
use kiln_protocol::{BuildId, Digest};
use serde_json::{Map, Value, json};

use crate::seal::Sealed;

/// The content of `--metadata-file`: the keys that buildx writes, and Kiln's own. An output of files has no image.
pub fn metadata(build_id: &BuildId, sealed: Option<&Sealed>, phases: &[PhaseDuration]) -> Value {
    let mut keys = Map::new();
    if let Some(sealed) = sealed {
        keys.insert("containerimage.digest".to_owned(), json!(sealed.image.manifest_digest));
        keys.insert("containerimage.config.digest".to_owned(), json!(sealed.image.config_digest));
        keys.insert("containerimage.descriptor".to_owned(), json!(sealed.descriptor()));
    }
    let mut milliseconds = BTreeMap::<&str, u64>::new();
    // Client and agent both have a start, and a phase may be entered again.
    for spent in phases {
        *milliseconds.entry(spent.phase.label()).or_default() += spent.milliseconds;
    }
    keys.insert("kiln.build.id".to_owned(), json!(build_id.to_string()));
    keys.insert("kiln.build.phases.milliseconds".to_owned(), json!(milliseconds));
    Value::Object(keys)
}

/// The content of `--iidfile`: the image id, without a newline, as docker writes it.
pub fn image_id(config_digest: &Digest) -> String {
    config_digest.to_string()
}

#[cfg(test)]
mod tests {
    use kiln_protocol::result::Phase;

    use super::*;
    use crate::seal::manifest::Compression;
    use crate::seal::testing::{Export, Store, tar_of};
    use kiln_protocol::request::ImageFormat;

    #[test]
    fn metadata_has_the_keys_that_buildx_users_read() {
        let export = Export::by_hand(ImageFormat::Docker, Compression::None, &[tar_of("a", b"a")]);
        let sealed = export.seal(&[], &Store::new()).unwrap();
        let id = BuildId::generate();
        let phases = [PhaseDuration { phase: Phase::Seal, milliseconds: 7 }];
        let value = metadata(&id, Some(&sealed), &phases);
        assert_eq!(value["containerimage.digest"], json!(sealed.image.manifest_digest));
        assert_eq!(value["containerimage.config.digest"], image_id(&sealed.image.config_digest));
        let descriptor = json!({"digest": sealed.image.manifest_digest, "size": sealed.manifest.len(),
            "mediaType": "application/vnd.docker.distribution.manifest.v2+json"});
        assert_eq!(value["containerimage.descriptor"], descriptor);
        assert_eq!(value["kiln.build.id"], id.to_string());
        assert_eq!(value["kiln.build.phases.milliseconds"], json!({"seal": 7}));
        let files = metadata(&id, None, &[]);
        assert!(!files.to_string().contains("containerimage"), "{files}");
    }
}
