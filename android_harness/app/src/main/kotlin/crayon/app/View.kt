package crayon.app

import android.app.Activity
import android.view.View

/** A view of the layout, which is there. */
fun <T : View> Activity.view(id: Int): T = checkNotNull(findViewById<T>(id))

/** A view below this one, which is there. */
fun <T : View> View.view(id: Int): T = checkNotNull(findViewById<T>(id))
