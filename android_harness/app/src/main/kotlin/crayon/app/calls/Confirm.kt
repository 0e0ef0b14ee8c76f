package crayon.app.calls

import android.app.Activity
import android.app.AlertDialog
import android.content.ActivityNotFoundException
import android.content.Intent
import android.widget.Toast
import crayon.app.R

/** Asks the user, and only after a yes starts what was shown. */
fun Activity.confirm(action: PhoneAction): AlertDialog =
    AlertDialog
        .Builder(this)
        .setTitle(R.string.confirm)
        .setMessage(action.title(this))
        .setPositiveButton(R.string.yes) { _, _ ->
            if (!start(action.intents)) Toast.makeText(this, R.string.no_app, Toast.LENGTH_LONG).show()
        }.setNegativeButton(R.string.no, null)
        .show()

/** Starts the first that some app answers; false: there is none. */
private fun Activity.start(intents: List<Intent>): Boolean =
    intents.any { intent ->
        try {
            startActivity(intent)
            true
        } catch (_: ActivityNotFoundException) {
            false
        } catch (_: SecurityException) {
            false // an app that answers, but not to us
        }
    }
