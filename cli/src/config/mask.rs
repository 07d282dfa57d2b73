//! What a configuration keeps to itself when it is shown (pure).

use serde_json::Value;

use super::File;

const MASK: &str = "***";

/// Hides passwords of proxies, and every text in the settings of plugins: only a plugin knows which is a secret.
pub(super) fn mask(file: &mut File) {
    let proxy = &mut file.build.proxy;
    for url in [&mut proxy.http, &mut proxy.https].into_iter().flatten() {
        *url = without_password(url);
    }
    for plugin in &mut file.plugin {
        plugin.settings.values_mut().for_each(hide_texts);
    }
}

fn without_password(url: &str) -> String {
    let start = url.find("://").map_or(0, |at| at + 3);
    // The last @ of the whole text: a password may hold any character that somebody forgot to escape.
    let Some(end) = url[start..].rfind('@').map(|at| start + at) else { return url.to_owned() };
    match url[start..end].find(':') {
        Some(colon) => format!("{}:{MASK}{}", &url[..start + colon], &url[end..]),
        None => format!("{}{MASK}{}", &url[..start], &url[end..]),
    }
}

fn hide_texts(value: &mut Value) {
    match value {
        Value::String(text) => MASK.clone_into(text),
        Value::Array(list) => list.iter_mut().for_each(hide_texts),
        Value::Object(map) => map.values_mut().for_each(hide_texts),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_are_hidden_and_nothing_else() {
        for (url, shown) in [
            ("http://proxy:3128", "http://proxy:3128"),
            ("http://me:secret@proxy:3128/x", "http://me:***@proxy:3128/x"),
            ("http://me:s/e@c:t@proxy", "http://me:***@proxy"),
            ("http://token@proxy", "http://***@proxy"),
            ("me:secret@proxy:3128", "me:***@proxy:3128"),
        ] {
            assert_eq!(without_password(url), shown);
        }
    }

    #[test]
    fn texts_of_plugins_are_hidden_at_any_depth() {
        let mut value = serde_json::json!({ "a": ["x", { "b": "y" }], "n": 1 });
        hide_texts(&mut value);
        assert_eq!(value, serde_json::json!({ "a": ["***", { "b": "***" }], "n": 1 }));
    }
}
