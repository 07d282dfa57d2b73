//! Shell: the contract's `host` and `effects` interfaces.

use wasmtime::component::Resource;

use super::answer::{self, MAX_NOTES, MAX_VIOLATIONS};
use super::bindings::{API_VERSION, ReportHandle, effects, host, types};
use super::state::{CallState, Ended};

type Answer<T> = wasmtime::Result<T>;

impl host::Host for CallState {
    fn log(&mut self, level: host::Level, message: String, fields: Vec<(String, String)>) -> Answer<()> {
        self.count_call()?;
        let mut line = message;
        for (key, value) in fields {
            line.extend([" ", &key, "=", &value]);
        }
        let cost = line.len().max(1);
        if cost > self.log_left {
            self.log_left = 0;
            return Ok(());
        }
        self.log_left -= cost;
        emit(&self.terms.name, level, &answer::shortened(&line));
        Ok(())
    }

    fn settings(&mut self) -> Answer<String> {
        self.count_call()?;
        Ok(self.terms.settings.clone())
    }

    fn cancelled(&mut self) -> Answer<bool> {
        self.count_call()?;
        Ok(self.is_stopping())
    }

    fn api_version(&mut self) -> Answer<String> {
        self.count_call()?;
        Ok(API_VERSION.to_owned())
    }
}

fn emit(plugin: &str, level: host::Level, line: &str) {
    match level {
        host::Level::Trace => tracing::trace!(plugin, "{line}"),
        host::Level::Debug => tracing::debug!(plugin, "{line}"),
        host::Level::Info => tracing::info!(plugin, "{line}"),
        host::Level::Warn => tracing::warn!(plugin, "{line}"),
        host::Level::Error => tracing::error!(plugin, "{line}"),
    }
}

impl effects::Host for CallState {}

impl effects::HostReport for CallState {
    fn warn(&mut self, _this: Resource<ReportHandle>, violation: types::Violation) -> Answer<()> {
        self.count_call()?;
        if self.report.warnings.len() == MAX_VIOLATIONS {
            return Err(wasmtime::Error::new(Ended::Output("more than 200 warnings")));
        }
        self.report.warnings.push(answer::violation(&violation).map_err(wasmtime::Error::new)?);
        Ok(())
    }

    fn note(&mut self, _this: Resource<ReportHandle>, key: String, value: String) -> Answer<()> {
        self.count_call()?;
        if self.report.notes.len() == MAX_NOTES {
            return Err(wasmtime::Error::new(Ended::Output("more than 100 notes")));
        }
        self.report.notes.push(answer::note(&key, &value).map_err(wasmtime::Error::new)?);
        Ok(())
    }

    fn drop(&mut self, this: Resource<ReportHandle>) -> Answer<()> {
        Ok(self.table.delete(this).map(drop)?)
    }
}
