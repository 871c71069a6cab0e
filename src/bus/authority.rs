//! Decides who may call our methods: root, and those whom polkit lets.
//!
//! The bus itself says who the caller is; nothing in the message is believed. What cannot be asked is a no.

use std::collections::HashMap;

use zbus::fdo::{DBusProxy, Error};
use zbus::message::{Flags, Header};
use zbus::{Connection, Variant, proxy};

const ROOT: u32 = 0;

/// Let polkit ask a person for a password, if the caller waits for that.
const ALLOW_INTERACTION: u32 = 1;

/// Whether it may, whether it would after a password, and details.
type Answer = (bool, bool, HashMap<String, String>);

#[proxy(
    interface = "org.freedesktop.PolicyKit1.Authority",
    default_service = "org.freedesktop.PolicyKit1",
    default_path = "/org/freedesktop/PolicyKit1/Authority"
)]
trait Authority {
    fn check_authorization(
        &self,
        subject: &(&str, HashMap<&str, Variant<'_>>),
        action: &str,
        details: &HashMap<&str, &str>,
        flags: u32,
        cancellation: &str,
    ) -> zbus::Result<Answer>;
}

/// Refuses unless the caller is root or polkit grants `action`.
pub(super) async fn permit(
    bus: &Connection,
    header: &Header<'_>,
    action: &str,
) -> Result<(), Error> {
    let denied = |why: &str| {
        Error::AccessDenied(format!("{why}; run this as root, or grant {action} with polkit"))
    };
    let sender = header.sender().ok_or_else(|| denied("nobody said who calls"))?;
    let daemon = DBusProxy::new(bus).await?;
    let uid = daemon.get_connection_unix_user(sender.clone().into()).await;
    if uid.map_err(|_error| denied("the bus does not know the caller"))? == ROOT {
        return Ok(());
    }
    let interactive = header.primary().flags().contains(Flags::ALLOW_INTERACTIVE_AUTH);
    let flags = if interactive { ALLOW_INTERACTION } else { 0 };
    let subject = ("system-bus-name", HashMap::from([("name", Variant::from(sender.as_str()))]));
    let asked = async {
        let authority = AuthorityProxy::new(bus).await?;
        authority.check_authorization(&subject, action, &HashMap::new(), flags, "").await
    };
    match asked.await {
        Ok((true, _, _)) => Ok(()),
        Ok((false, _, _)) => Err(denied("polkit does not allow it")),
        Err(error) => {
            tracing::debug!(%error, "polkit was not asked");
            Err(denied("only root may do this here"))
        }
    }
}
